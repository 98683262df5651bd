"""The commands, in process, with settings that take seconds."""

import errno
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from data.image_sets import write_folder
from experiments.tiny import OPTIONS as TINY

import jaxmaml
from jaxmaml import cli, files, fitting
from jaxmaml.commands import training
from jaxmaml.experiments import (
    experiment,
    figures,
    learners,
    options,
    presets,
    progress,
    settings,
    tables,
)


def _error(capsys, *arguments):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr().err.strip()
    assert captured.startswith("error: ")
    assert "\n" not in captured
    return captured


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "run"
    code = cli.main(["compare", "sinusoid-5shot", "--out", str(out), *TINY])
    return code, out


def test_compare_writes_a_whole_run(compared):
    code, out = compared
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "config.json", "gradient_agreement.png", "learning_curves.png",
        "metric_per_step.png", "metrics.jsonl", "regression.png", "results.json", "training",
    ]  # fmt: skip


def test_results_are_the_stable_interface(compared):
    results = json.loads((compared[1] / "results.json").read_text())
    assert list(results["runs"]) == ["exact", "first"]
    for run in results["runs"].values():
        assert len(run["mse_per_step"]) == len(run["ci95_per_step"]) == 3
        assert run["num_outer_steps"] == 6
    gradient = results["gradient"]
    assert gradient["step"][0] == 0
    assert len(gradient["cosine"]) == len(gradient["norm_ratio"]) == len(gradient["step"])


def test_evaluate_reads_the_run_back(compared, capsys):
    assert cli.main(["evaluate", str(compared[1]), "--num-test-tasks", "5"]) == 0
    shown = capsys.readouterr().out
    results = json.loads((compared[1] / "results.json").read_text())
    for run in results["runs"].values():
        assert f"{run['mse_per_step'][2]:.3f} ± {run['ci95_per_step'][2]:.3f}" in shown


def test_a_directory_of_data_without_effect_is_refused(compared, capsys):
    message = _error(capsys, "evaluate", str(compared[1]), "--data-dir", ".")
    assert "data_dir has no effect on dataset='sinusoid'" in message


def test_the_average_is_scored_and_training_stays_the_same(compared, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--out", str(out), *TINY, "--averaging", "0.9"]
    assert cli.main(["train", "sinusoid-5shot", *options]) == 0

    def exact(run_dir):
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if line["label"] == "exact" and "loss" in line]
        return losses, json.loads((run_dir / "results.json").read_text())["runs"]["exact"]

    plain_losses, plain = exact(compared[1])
    losses, averaged = exact(out)
    np.testing.assert_allclose(losses, plain_losses, rtol=1e-5)
    assert averaged["mse_per_step"] != plain["mse_per_step"]
    capsys.readouterr()
    assert cli.main(["evaluate", str(out), "--num-test-tasks", "5"]) == 0
    assert f"{averaged['mse_per_step'][2]:.3f} ±" in capsys.readouterr().out


def test_another_run_is_not_overwritten(compared, capsys):
    message = _error(capsys, "train", "sinusoid-5shot", "--out", str(compared[1]))
    assert "holds another run, and is continued by the same settings only" in message
    assert "num_test_tasks is 5 there and 600 here" in message
    assert "num_outer_steps" not in message  # more of them may be asked for


def test_a_complete_run_is_not_repeated(compared, capsys):
    assert cli.main(["compare", "sinusoid-5shot", "--out", str(compared[1]), *TINY]) == 0
    assert "is complete: a larger --num-outer-steps" in capsys.readouterr().out


def test_inner_rates_are_each_tried(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--out", str(out), *TINY, "--num-outer-steps", "2", "--inner-lrs", "0.01", "0.1"]
    assert cli.main(["compare", "sinusoid-5shot", *options]) == 0
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert {label: run["inner_lr"] for label, run in runs.items()} == {
        "exact@0.01": 0.01, "first@0.01": 0.01, "exact@0.1": 0.1, "first@0.1": 0.1,
    }  # fmt: skip
    assert "each at its best rate" in capsys.readouterr().out


def test_train_stops_at_a_loss_that_is_not_finite(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--order", "first", "--out", str(out), *TINY, "--inner-lr", "1e30"]
    assert cli.main(["train", "sinusoid-5shot", *options]) == 1
    assert "first stopped at outer step 0: loss is" in capsys.readouterr().err
    run = json.loads((out / "results.json").read_text())["runs"]["first"]
    assert run["num_outer_steps"] == 0
    assert run["num_nonfinite"] == 5
    assert run["mse_per_step"][0] is not None
    assert run["mse_per_step"][2] is None
    assert (out / "checkpoints" / "first").is_dir()

    # The same command has the same exit code, and promises nothing.
    assert cli.main(["train", "sinusoid-5shot", *options]) == 1
    printed = capsys.readouterr()
    assert printed.out == f"{out} is complete\n"
    assert "first stopped at outer step 0: loss is" in printed.err


def test_a_run_that_stops_early_or_skips_steps_has_not_failed(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--order", "first", "--out", str(out), *TINY[:-1], "--num-validations", "6"]
    options += ["--selection-steps", "1", "--patience", "2", "--num-averaged", "2"]
    command = ["train", "sinusoid-5shot", *options, "--outer-lr", "1e38", "--on-nonfinite", "skip"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "first stopped early at outer step 2: 2 validations without a better score" in shown
    assert "first left out 1 of its outer steps: not finite" in shown
    run = json.loads((out / "results.json").read_text())["runs"]["first"]
    assert (run["stopped"], run["stopped_early"], run["num_skipped"]) == (None, True, 1)
    assert cli.main(command) == 0
    assert f"{out} is complete" in capsys.readouterr().out
    assert cli.main(["evaluate", str(out), "--num-test-tasks", "5"]) == 0
    assert "mean of" in capsys.readouterr().out


def test_interruption_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **options):
        yield from itertools.islice(run_slices(*args, **options), 2)
        raise KeyboardInterrupt

    run_slices = fitting.run_slices
    monkeypatch.setattr(fitting, "run_slices", interrupted)
    out = tmp_path / "run"
    assert cli.main(["train", "sinusoid-5shot", "--out", str(out), *TINY]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"config.json", "metrics.jsonl", "training"}
    json.loads((out / "config.json").read_text())


def test_a_run_that_was_interrupted_at_its_start_blocks_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "compile_program", interrupted)
        assert cli.main(["train", "sinusoid-5shot", "--out", str(out), *TINY]) == 130
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_saving_is_one_line(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    command = ["train", "sinusoid-5shot", "--order", "first", "--out", str(tmp_path / "r"), *TINY]
    assert cli.main(command) == 2
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert last.startswith("error: checkpoint ")
    assert "the disk has 0.0 MB left" in last
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_a_damaged_run_is_one_line(compared, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(compared[1], copy)
    (copy / "checkpoints" / "exact" / "_METADATA").write_bytes(b"")
    assert "exact/_METADATA is damaged" in _error(capsys, "evaluate", str(copy))
    (copy / "config.json").write_text("[1]")
    assert "config.json is not as it was written" in _error(capsys, "evaluate", str(copy))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compare", "sinusoid-5shots"], "did you mean 'sinusoid-5shot'"),
        (["train", "sinusoid-5shot", "--order", "second"], "order must be one of"),
        (
            ["compare", "sinusoid-5shot", "--num-outer-steps", "0"],
            "num_outer_steps must be an",
        ),
        (
            ["compare", "sinusoid-5shot", "--num-inner-steps", "-1"],
            "num_inner_steps must be an",
        ),
        (["compare", "sinusoid-5shot", "--num-test-tasks", "0"], "num_test_tasks must be"),
        (["compare", "sinusoid-5shot", "--way", "2"], "way must be 1"),
        (["compare", "sinusoid-5shot", "--inner-lrs", "0.1", "0.1"], "inner_lrs must differ"),
        (["train", "omniglot-5w1s", "--data-dir", "nowhere"], "jaxmaml data prepare omniglot"),
        (["train", "omniglot-5w1s", "--split", "mine"], "split='mine'"),
        (
            ["train", "sinusoid-5shot", "--num-processes", "2"],
            "can be used with --distributed only",
        ),
        (["evaluate", "nowhere"], "holds no run"),
        (["train", "sinusoid-5shot", "--stream"], "no images to stream"),
        (["train", "glyphs-5w1s", "--num-workers", "2"], "with --stream only"),
        (["train", "glyphs-5w1s", "--no-image-cache"], "with --stream only"),
        (["train", "glyphs-5w1s", "--crop", "28"], "crop must be from 0"),
        (["train", "glyphs-5w1s", "--dataset", "mnist"], "dataset='mnist' is unknown"),
        (["train", "glyphs-5w1s", "--dataset", "folder:nowhere"], "nowhere does not exist"),
        (["data", "prepare", "omniglot", "--archive-dir", "nowhere"], "omniglot"),
        (["data", "split", "folder:nowhere", "--out", "s.json"], "nowhere does not exist"),
        (["compare", "glyphs-5w1s", "--learners", "maml,fomal"], "did you mean 'fomaml'"),
        (["compare", "glyphs-5w1s", "--learners", "maml,maml"], "learners must differ"),
        (
            ["compare", "sinusoid-5shot", "--learners", "protonet"],
            "'protonet' is for classification",
        ),
        (["train", "sinusoid-5shot", "--learner", "reptile", "--order", "first"], "has no order"),
        (["train", "glyphs-5w1s", "--learner", "r2d2", "--norm", "inductive"], "norm='inductive'"),
        (["train", "glyphs-5w1s", "--norm", "per_step"], "only 'maml_plus_plus'"),
        (["train", "sinusoid-5shot", "--flip"], "flip has no effect on sinusoid-5shot"),
        (["train", "glyphs-5w1s", "--hidden-sizes=-1"], "each of hidden_sizes must be an"),
        (["train", "glyphs-5w1s", "--hidden-sizes", "8"], "hidden_sizes has no effect"),
        (["train", "glyphs-5w1s", "--learner", "fomaml", "--order", "exact"], "is first order"),
        (["train", "glyphs-5w1s", "--learner", "MAML"], "did you mean 'maml'?"),
        (["train", "glyphs-5w1s", "--learner", "x"], "unknown learner 'x': Known are maml,"),
        (["compare", "glyphs-5w1s", "--learners", "protonet", "--inner-lrs", "1"], "not use it"),
        (["compare", "glyphs-5w1s", "--inner-lr", "1", "--inner-lrs", "2"], "with inner_lrs"),
        (["train", "sinusoid-5shot", "--data-dir", "d"], "data_dir has no effect on dataset="),
        (["train", "glyphs-5w1s", "--num-filters", "1000000000"], "the limit is 1,000,000,000"),
        (["train", "glyphs-5w1s", "--num-inner-steps", "9" * 21], "must be at most 100,000"),
        (["train", "sinusoid-5shot", "--outer-lr", "1e39"], "outer_lr must be 0 or more, and"),
        (["train", "sinusoid-5shot", "--seed", "-1"], "seed must be an integer, 0 or more"),
        (
            ["train", "sinusoid-5shot", "--num-seeds", "0"],
            "num_seeds must be an integer, 1 or more",
        ),
        (["train", "sinusoid-5shot", "--patience", "-1"], "patience must be an integer, 0 or more"),
        (["train", "glyphs-5w1s", "--patience", "2"], "glyphs-5w1s with selection_steps=()"),
        (["train", "glyphs-5w1s", "--num-averaged", "5"], "glyphs-5w1s with selection_steps=()"),
        (["train", "sinusoid-5shot", "--seed", "4294967296"], "seed must be at most 4,294"),
        (["train", "sinusoid-5shot", "--num-test-tasks", "1"], "num_test_tasks must be an"),
        (
            ["train", "sinusoid-5shot", "--checkpoint-every", "0"],
            "checkpoint_every must be an integer, 1 or more",
        ),
        (["data", "list", "--data-dir", "~nobody-there/x"], "has no home directory"),
        (["train", "glyphs-5w1s", "--data-dir", "~nobody-there/x"], "has no home directory"),
        (["train", "glyphs-5w1s", "--dataset", "folder:~nobody-there/x"], "has no home directory"),
        (["data", "show", "sinusoid-5shot", "--out", "noext"], "a file with a suffix: .png"),
        (["data", "show", "sinusoid-5shot", "--way", "2"], "way must be 1"),
        (["data", "prepare", "glyphs", "--archive-dir", "."], "archive_dir has no effect"),
        (["data", "split", "folder:.", "--out", "s", "--data-dir", "d"], "data_dir has no effect"),
    ],
)
def test_a_mistake_is_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e9)  # a slow machine is not a mistake
    monkeypatch.chdir(tmp_path)
    assert expected in _error(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxmaml {jaxmaml.__version__}\n"


def test_a_warning_is_one_line(tmp_path, capsys):
    write_folder(tmp_path / "few", sizes=(3, 3), side=4)
    (tmp_path / "few" / "class0" / "notes.txt").touch()
    command = ["data", "split", f"folder:{tmp_path / 'few'}", "--out", str(tmp_path / "split.json")]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        cli.main(command)
    (line, *_) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: folder ")
    assert line.endswith(": class0/notes.txt")
    assert "folders.py" not in line


def test_too_few_classes_of_a_split_are_named_with_the_remedies(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e9)
    write_folder(tmp_path / "some", sizes=(4,) * 12, side=4)
    folder, split = f"folder:{tmp_path / 'some'}", tmp_path / "split.json"
    assert cli.main(["data", "split", folder, "--out", str(split)]) == 0
    capsys.readouterr()
    message = _error(capsys, "train", "pictures-5w1s", "--dataset", folder, "--split", str(split))
    assert "is more than the 2 classes of val in the class split " + str(split) in message
    assert "--fractions" in message


def test_a_matplotlib_that_does_not_load_is_one_line(tmp_path):
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "jaxmaml", "train", "sinusoid-5shot", "--out", str(out)],
        capture_output=True, text=True, check=False, env={**os.environ, "MPLBACKEND": "nothing"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: matplotlib cannot be loaded with MPLBACKEND='nothing'")
    assert done.stderr.count("\n") == 1
    assert not out.exists()


# Without its plugin, JAX raises an AssertionError without text for "cuda".
@pytest.mark.parametrize("error", [RuntimeError("no backend 'x'"), AssertionError()])
def test_a_backend_that_is_not_there_is_one_line(error, tmp_path, monkeypatch, capsys):
    def devices(*args):
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "x")
    message = _error(capsys, "train", "sinusoid-5shot", "--out", str(tmp_path / "run"))
    assert message.startswith("error: JAX cannot start with JAX_PLATFORMS='x': ")
    assert not list(tmp_path.iterdir())


def test_an_output_without_unicode_is_written(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert cli.main(["presets"]) == 0
    assert b"98.7 ? 0.4 %" in written.getvalue()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_an_output_that_is_full_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["presets"]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_mistake_that_cannot_be_said_has_its_exit_code(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert cli.main(["presets", "nothing"]) == 2


def test_two_runs_of_the_same_second_have_directories_of_their_own(monkeypatch):
    monkeypatch.setattr(training.time, "strftime", lambda _: "20260101-000000")
    preset = presets.get("sinusoid-5shot")
    names = {training._new_directory(preset).name for _ in range(2)}
    assert len(names) == 2
    assert all(name.startswith("sinusoid-5shot-20260101-000000-") for name in names)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        files.WriteError("run/results.json cannot be written"),
        files.ReadError("images/a.png: image cannot be decoded"),
        MemoryError("16 GiB"),
        RuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate 16 GiB"),
    ],
)
def test_what_a_user_can_mend_after_the_start_is_one_line(error, monkeypatch, capsys):
    _fail_in_presets(monkeypatch, error)
    assert str(error) in _error(capsys, "presets")


@pytest.mark.parametrize("error", [ValueError("shapes differ"), KeyError("mean"), TypeError("x")])
def test_a_bug_has_its_traceback_and_an_exit_code_of_its_own(error, monkeypatch, capsys):
    _fail_in_presets(monkeypatch, error)
    assert cli.main(["presets"]) == cli.BUG == 70
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "This is a bug in jaxmaml" in printed


def _fail_in_presets(monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(tables, "presets_table", fail)


def test_an_output_that_is_closed_is_not_a_run_that_stopped(monkeypatch):
    # rich exits with 1 at a broken pipe.
    _fail_in_presets(monkeypatch, SystemExit(1))
    assert cli.main(["presets"]) == 2


@pytest.mark.parametrize("number", [300, 3000])
def test_a_long_value_is_not_echoed_whole(number, capsys):
    assert len(_error(capsys, "train", "x" * number)) < 600
    assert len(_error(capsys, "train", "glyphs-5w1s", "--way", "9" * number)) < 600


def test_presets_are_listed(capsys):
    assert cli.main(["presets"]) == 0
    assert "omniglot-mlp-5w5s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        "compare",
        "train",
        "evaluate",
        "adapt",
        "data",
        "data show",
        "data list",
        "data prepare",
        "data split",
        "report",
        "presets",
        "doctor",
    ],
)
def test_every_option_has_help_that_fits_the_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.main([*command.split(), "--help"])
    lines = capsys.readouterr().out.replace("│", " ").splitlines()
    for line, following in itertools.pairwise(lines):
        if re.match(r"\s*--[a-z]", line):
            text = line.strip().partition("  ")[2] or following.strip()
            assert text, line
            assert not re.match(r"--[a-z]", text), line
    assert max(map(len, lines)) <= 80


@pytest.mark.slow
def test_the_residual_of_imaml_is_printed(tmp_path, capsys):
    command = ["train", "sinusoid-5shot", "--learner", "imaml", "--out", str(tmp_path / "run")]
    steps = ["--num-test-inner-steps", "16", "--headline-step", "16"]
    assert cli.main([*command, *TINY, *steps]) == 0
    assert re.search(r"imaml: conjugate gradients leave [\d.e-]+ of", capsys.readouterr().out)


@pytest.mark.slow
def test_images_are_trained_on_and_drawn(test_data, tmp_path):
    out = tmp_path / "run"
    options = [*TINY, "--way", "3", "--num-outer-steps", "2", "--data-dir", str(test_data)]
    assert cli.main(["train", "omniglot-mlp-5w1s", "--out", str(out), *options]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["gradient"] is None
    assert 0 < results["floor"]["nearest_neighbour"] <= 1
    assert len(results["runs"]["exact"]["accuracy_per_step"]) == 3
    assert (out / "episode.png").stat().st_size > 0


@pytest.mark.slow
def test_a_stream_trains_as_a_pool_does(tmp_path):
    runs = {}
    learner = ["--learner", "fine_tuning"]  # whose batches also have class numbers
    cut = TINY.index("--num-test-inner-steps")  # it makes as many steps as in training
    tiny = TINY[:cut] + TINY[cut + 2 :]
    for name, given in (("pool", learner), ("stream", [*learner, "--stream"])):
        out = tmp_path / name
        size = ["--model", "mlp", "--way", "3", "--jitter", "0.1"]
        assert cli.main(["train", "glyphs-5w1s", "--out", str(out), *tiny, *size, *given]) == 0
        runs[name] = json.loads((out / "results.json").read_text())["runs"]["fine_tuning"]
    accuracy = "accuracy_per_step"
    np.testing.assert_allclose(runs["stream"][accuracy], runs["pool"][accuracy], atol=1e-6)


@pytest.mark.slow
def test_data_are_prepared_listed_and_divided(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    assert cli.main(["data", "list"]) == 0
    assert "nothing is prepared" in capsys.readouterr().out
    assert cli.main(["data", "prepare", "glyphs"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("glyphs/1.0.0")
    assert cli.main(["data", "list"]) == 0
    assert re.search(r"glyphs +1\.0\.0 +559 +11,180 ", capsys.readouterr().out)
    split = tmp_path / "split.json"
    command = ["data", "split", "tfds:glyphs", "--out", str(split), "--seed", "1"]
    assert cli.main([*command, "--fractions", "0.5", "0.3", "0.2"]) == 0
    listed = json.loads(split.read_text())
    assert [len(listed[name]) for name in ("train", "val", "test")] == [280, 167, 112]
    assert "a split is drawn once" in _error(capsys, *command)
    train = ["train", "glyphs-5w1s", *TINY, "--model", "mlp", "--num-outer-steps", "2"]
    own = ["--dataset", "tfds:glyphs", "--split", str(split), "--image-size", "16"]
    assert cli.main([*train, *own, "--out", str(tmp_path / "own")]) == 0


def test_an_episode_is_shown(tmp_path, capsys):
    picture = tmp_path / "shown.png"
    assert cli.main(["data", "show", "sinusoid-10shot", "--out", str(picture)]) == 0
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.write_bytes(b"my picture")
    message = _error(capsys, "data", "show", "sinusoid-10shot", "--out", str(picture))
    assert "shown.png exists already" in message
    assert picture.read_bytes() == b"my picture"


def test_a_picture_of_another_dataset_is_named_after_it(small_pictures, capsys):
    command = ["data", "show", "glyphs-5w1s", "--dataset", "omniglot", "--way", "3"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.strip() == "glyphs-5w1s-dataset=omniglot-way=3.png"


@pytest.fixture
def small_pictures(monkeypatch, tmp_path):
    """Lets `data show` build and draw nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "build_experiment", lambda *args, **options: None)
    monkeypatch.setattr(figures, "draw_episode", lambda built, path: None)


def test_a_picture_takes_only_the_settings_that_it_shows(capsys):
    error = _error(capsys, "data", "show", "glyphs-5w1s", "--inner-lr", "0.1")
    assert "unknown option --inner-lr; see jaxmaml data show --help" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected one of {compare, train, "),
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["train"], "Missing from jaxmaml train: PRESET see jaxmaml presets (required)"),
        (["train", "sinusoid-5shot", "--way", "x"], "--way must be an integer; got 'x'; see"),
        (["train", "sinusoid-5shot", "--inner-lr", "x"], "--inner-lr must be a number; got 'x'"),
        (
            ["train", "sinusoid-5shot", "--num-taks", "3"],
            "unknown option --num-taks; did you mean --num-tasks? See jaxmaml train --help",
        ),
        (["train", "sinusoid-5shot", "--inner-learning-rate=3"], "did you mean --inner-lr?"),
        (["data", "split", "omniglot"], "; see jaxmaml data split --help"),
        (
            ["train", "sinusoid-5shot", "--outer", "sgd"],
            "invalid choice 'sgd' for argument '--outer'",
        ),
        (["data", "splt"], "Available subcommands: show, list, prepare, split"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(arguments, message, capsys):
    error = _error(capsys, *arguments)
    assert message in error
    assert not set(error) & set("│╭─"), error
    assert "Got errors" not in error
    assert "'None'" not in error


def test_the_help_lists_the_commands_without_their_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "For example" not in capsys.readouterr().out


def test_the_help_names_every_learner():
    names = {*learners.LEARNERS, *learners.ALIASES}
    assert names == set(re.findall(r"[a-z_0-9]+", options.LEARNERS)) - {"for", "policies"}


@pytest.mark.parametrize("command", ["compare", "train"])
def test_the_help_has_examples_and_groups(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert f"    jaxmaml {command} " in text
    groups = re.findall(r"^(?:╭─)? (.+?) options (?:─+╮| *)$", text, flags=re.M)
    assert groups == ["run", *dict.fromkeys(_groups()), "devices"]


def _groups():
    return [field.metadata["group"] for field in settings.options().values()]


def _steps_of_events(out):
    """The outer steps of the events of the training, in their order."""
    from jaxmaml.experiments import event_files

    events = event_files._read(out / "tensorboard" / "exact" / event_files.NAME)
    values = [(value.tag, event.step) for event in events for value in event.summary.value]
    return [step for tag, step in values if tag == "training/loss"]


def test_event_files_have_the_rows_of_a_run_that_is_continued(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "sinusoid-5shot", "--out", str(out), *TINY]
    assert cli.main([*command, "--tensorboard"]) == 0
    assert _steps_of_events(out) == list(range(6))
    # Longer, without event files, and then what they lack.
    longer = [*command, "--num-outer-steps", "8"]
    assert cli.main(longer) == 0
    assert _steps_of_events(out) == list(range(6))
    assert cli.main([*longer, "--tensorboard"]) == 0
    assert "is complete" in capsys.readouterr().out
    assert _steps_of_events(out) == list(range(8))


def test_event_files_need_an_extra_which_is_said_before_anything_is_done(
    tmp_path, monkeypatch, capsys
):
    find_spec = importlib.util.find_spec
    absent = lambda name: None if name == "tensorboardX" else find_spec(name)
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    out = tmp_path / "run"
    message = _error(capsys, "train", "sinusoid-5shot", "--out", str(out), "--tensorboard", *TINY)
    assert "pip install 'jaxmaml[tensorboard]'" in message
    assert not out.exists()


def test_a_report_is_written_of_a_run(compared, tmp_path, capsys):
    out = tmp_path / "report"
    assert cli.main(["report", str(compared[1]), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    assert (out / "report.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no RUN_DIR is given: name at least one"),
        (["nothing"], "holds no run"),
        (["RUN", "RUN"], "is named twice"),
        (["RUN", "--out", "RUN"], "holds other files than a report"),
    ],
)
def test_a_report_that_cannot_be_made_is_one_line(compared, tmp_path, capsys, arguments, message):
    before = sorted(compared[1].iterdir())
    words = [str(compared[1]) if word == "RUN" else word for word in arguments]
    found = words if "--out" in words else [*words, "--out", str(tmp_path / "out")]
    assert message in _error(capsys, "report", *found)
    assert not list(tmp_path.iterdir())
    assert sorted(compared[1].iterdir()) == before


def test_the_help_has_no_percent_sign_twice(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    assert "1 % of the time" in " ".join(shown.replace("│", "").split())
    assert "%%" not in shown
