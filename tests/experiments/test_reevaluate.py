"""Saved runs give the scores of their training again, and serve other tasks if they can."""

import dataclasses
import json
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.image_sets import write_folder
from rich.console import Console

from experiments.tiny import OPTIONS, PRESET, REGRESSION, save_untrained
from jaxmaml import cli
from jaxmaml.data import class_splits, datasets
from jaxmaml.experiments import candidates, compare, figures, presets, reevaluate, unseen
from jaxmaml.experiments.experiment import init_state, scored_tasks
from jaxmaml.experiments.run_dir import RunDir, write_json
from jaxmaml.experiments.tasks import class_split_of

IMAGES = ["--model", "mlp", "--way", "4", "--num-validations", "1", *OPTIONS[:-5]]


def _shown(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_scores_of_the_training_are_found_again(compared):
    comparison, runs = compared
    restored = reevaluate.restore(comparison.run_dir.path, num_test_tasks=5)
    shown = _shown(reevaluate.scores_table(restored, 5))
    for run in runs:
        assert f"{run.test.mean[2]:.3f} ± {run.test.ci95[2]:.3f}" in shown


def test_the_mean_of_the_best_states_is_scored_again(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "draw_all", lambda *args, **options: [])
    preset = presets.override(REGRESSION, num_averaged=2, selection_steps=(1,))
    out, specs = tmp_path / "run", candidates.comparison(preset)[1:]
    with compare.prepare(preset, specs, out, num_test_tasks=5) as comparison:
        (run,) = compare.execute(comparison)
    assert run.averaged is not None
    stored = json.loads((out / "results.json").read_text())["runs"]["first"]["averaged"]
    assert stored["mse_per_step"] == run.averaged.mean.tolist()
    assert len(stored["steps"]) == 2
    restored = reevaluate.restore(out, num_test_tasks=5)
    assert _shown(reevaluate.scores_table(restored, 5)).count("first, mean of 2") == 1
    _, mean = reevaluate.scores(restored, 5).values()
    np.testing.assert_array_equal(mean.mean, run.averaged.mean)

    # The states are verified as that of the run is.
    damaged = next((out / "averaged" / "first" / "ocdbt.process_0" / "d").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"averaged/first/.* is damaged"):
        reevaluate.restore(out, num_test_tasks=5)
    shutil.rmtree(out / "averaged")
    with pytest.raises(ValueError, match="has no tested state of 'first'"):
        reevaluate.restore(out, num_test_tasks=5)


def test_other_tasks_are_named_and_scored(compared):
    comparison, _ = compared
    restored = reevaluate.restore(
        comparison.run_dir.path, num_test_tasks=5, shot=7, num_test_inner_steps=4, way=None
    )
    shown = _shown(reevaluate.scores_table(restored, 5))
    assert "sinusoid-5shot, shot=7, test_query=3, num_test_inner_steps=4: test MSE" in shown
    assert re.search(r"^ *4 ", shown, re.MULTILINE)


def test_the_statistics_of_the_support_alone_are_scored_too(compared):
    comparison, _ = compared
    restored = reevaluate.restore(comparison.run_dir.path, num_test_tasks=5)
    spec = next(iter(restored.states))
    assert [suffix for suffix, *_ in reevaluate._variants(restored, spec)] == [""]
    trained = dataclasses.replace(restored.trained, norm="transductive")
    variants = reevaluate._variants(restored._replace(trained=trained), spec)
    assert [suffix for suffix, *_ in variants] == ["", ", inductive"]
    assert variants[0][2] == ()
    assert variants[1][2] != ()
    without_state = spec._replace(learner="cavia")
    variants = reevaluate._variants(restored._replace(trained=trained), without_state)
    assert [suffix for suffix, *_ in variants] == [""]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "glyphs"}, "a run of 'sinusoid' cannot be tested on 'glyphs'"),
        ({"way": 2}, "way must be 1 for regression"),
        ({"split": "x"}, "split has no effect on sinusoid-5shot"),
        ({"image_size": 28}, "image_size has no effect on sinusoid-5shot"),
        ({"num_test_tasks": 1}, "num_test_tasks must be an integer, 2 or more"),
    ],
)
def test_tasks_that_a_run_cannot_serve_are_refused(compared, changes, message):
    with pytest.raises(ValueError, match=message):
        reevaluate.restore(compared[0].run_dir.path, **{"num_test_tasks": 5, **changes})


def test_a_missing_checkpoint_is_named(compared, tmp_path):
    directory = RunDir(tmp_path)
    directory.create(compared[0].config)
    with pytest.raises(
        ValueError, match=r"has no tested state of .exact.: its training was interr"
    ):
        reevaluate.restore(tmp_path, num_test_tasks=5)


@pytest.mark.slow
def test_compare_takes_any_learners_and_evaluate_any_tasks(small_datasets, tmp_path, capsys):
    """One test, because workers share no run, and several learners take long to compile."""
    out = tmp_path / "run"
    names = "maml,protonet,fine_tuning"
    command = ["compare", "glyphs-5w1s", "--learners", names, "--out", str(out), *IMAGES]
    assert cli.main(command) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["runs"]) == ["maml", "protonet", "fine_tuning"]
    assert [len(run["accuracy_per_step"]) for run in results["runs"].values()] == [4, 1, 21]
    assert all(0 <= run["nearest_neighbour_on_features"] <= 1 for run in results["runs"].values())
    assert (out / "metric_per_step.png").stat().st_size > 0
    capsys.readouterr()
    command = ["evaluate", str(out), "--num-test-tasks", "3"]
    assert cli.main([*command, "--way", "3", "--shot", "2"]) == 0
    shown = capsys.readouterr().out
    assert "way=3, shot=2" in shown
    assert "maml, inductive" in " ".join(shown.split())  # the learner that can
    assert cli.main([*command, "--way", "5"]) == 2
    assert "only learners without a fixed head" in capsys.readouterr().err
    assert cli.main([*command, "--image-size", "14"]) == 2
    assert "trained on inputs of 4x4x1" in capsys.readouterr().err


def test_the_restored_state_is_that_of_the_run(compared):
    comparison, runs = compared
    restored = reevaluate.restore(comparison.run_dir.path, num_test_tasks=5)
    for run in runs:
        state = restored.states[run.candidate.spec]
        assert int(state.step) == int(run.meta_state.step)
        np.testing.assert_array_equal(
            state.params["head"]["kernel"], jnp.asarray(run.meta_state.params["head"]["kernel"])
        )


def _as_states(restored):
    return {spec.label: jax.tree.leaves(state) for spec, state in restored.states.items()}


def _refused_after_edits(compared, tmp_path, num_positions, skipped=()):
    """Flips one byte of a file at a time: a run that is not refused is what it was.

    Returns the files by whose name the run was refused, and the messages.
    """
    source, copy = compared[0].run_dir.path, tmp_path / "run"
    shutil.copytree(source, copy)
    before = _as_states(reevaluate.restore(copy, num_test_tasks=5))
    refused = {}
    edited = [
        path
        for path in copy.rglob("*")
        if path.is_file() and path.suffix != ".png" and not {*path.parts} & {*skipped}
    ]
    for path in sorted(edited):
        content = path.read_bytes()
        for position in range(0, len(content), -(-len(content) // num_positions)):
            flipped = bytes([content[position] ^ 1])
            path.write_bytes(content[:position] + flipped + content[position + 1 :])
            try:
                found = _as_states(reevaluate.restore(copy, num_test_tasks=5))
                jax.tree.map(np.testing.assert_array_equal, found, before)
            except ValueError as error:
                refused[path.relative_to(copy).as_posix()] = str(error)
        path.write_bytes(content)
    return refused


def _check_refused(refused):
    assert {"config.json", "checkpoints/first/_METADATA", "checkpoints/first/_sharding"} <= set(
        refused
    )
    assert "metrics.jsonl" not in refused
    for name, message in refused.items():
        assert name in message or name.endswith("/manifest.json")
        assert "\n" not in message


def test_a_changed_byte_is_refused_or_changes_nothing(compared, tmp_path):
    _check_refused(_refused_after_edits(compared, tmp_path, 1, skipped=["exact", "training"]))


@pytest.mark.slow
def test_a_changed_byte_anywhere_is_refused_or_changes_nothing(compared, tmp_path):
    _check_refused(_refused_after_edits(compared, tmp_path, 10))


def test_a_checkpoint_is_not_scored_under_another_configuration(compared, tmp_path):
    """Without config.json and results.json a directory could be trained in once more."""
    source, copy = compared[0].run_dir.path, RunDir(tmp_path / "run")
    shutil.copytree(source, copy.path)
    copy.config.unlink()
    copy.results.unlink()
    other = presets.override(REGRESSION, inner_lr=0.5)
    again = compare.prepare(other, candidates.comparison(other), copy.path)
    with pytest.raises(ValueError, match=r"holds another run \(metrics.jsonl\)"), again:
        pass
    # Even with a config.json of other settings the old parameters are not scored under it.
    with compare.prepare(other, candidates.comparison(other), tmp_path / "other") as comparison:
        write_json(copy.config, comparison.config)
    with pytest.raises(ValueError, match="checkpoints/exact was trained with another config"):
        reevaluate.restore(copy.path, num_test_tasks=5)


def _save_untrained(path, sizes, numbers, learner="maml"):
    """Writes (run directory, split file) of a run that was never trained, in a directory.

    Its folder "images" has classes of these sizes, of which some numbers are in train, val and test.
    """
    write_folder(path / "images", sizes=sizes)
    names, ends = [f"class{i}" for i in range(len(sizes))], np.cumsum(numbers)[:-1]
    divided = [part.tolist() for part in np.split(np.array(names), ends)]
    split = path / "split.json"
    class_splits.write(split, dict(zip(class_splits.SPLITS, divided, strict=True)))
    preset = presets.override(
        PRESET, way=2, shot=1, query=3, test_query=1,
        dataset="folder:images", split="split.json", image_size=8,
    )  # fmt: skip
    directory, spec = RunDir(path / "run"), candidates.single(preset, learner)
    with compare.prepare(preset, [spec], directory.path) as comparison:
        directory.create(comparison.config)
        state = init_state(comparison.experiment, comparison.candidates[0])
        directory.save_state(spec.label, state, comparison.config)
    return directory.path, split


@pytest.fixture
def trained_on_a_folder(tmp_path, monkeypatch):
    """(run directory, split file) of a run on a folder of images, named by relative paths."""
    monkeypatch.chdir(tmp_path)
    return _save_untrained(tmp_path, (4,) * 7, (3, 2, 2))


def _classes(run_dir, **changes):
    """Returns the classes of the test."""
    restored = reevaluate.restore(run_dir, **{"num_test_tasks": 2, **changes})
    class_split = class_split_of(restored.experiment.sources)
    assert class_split is not None
    assert list(class_split) == ["test"]
    return class_split["test"]


def test_the_classes_are_those_of_the_run_and_not_of_the_split_file_today(trained_on_a_folder):
    run_dir, split = trained_on_a_folder
    classes = json.loads(split.read_text())
    split.unlink()
    assert _classes(run_dir) == classes["test"]
    class_splits.write(split, {**classes, "train": classes["test"], "test": classes["train"]})
    assert _classes(run_dir) == classes["test"]
    # A split that is given is the one of today.
    with pytest.warns(UserWarning, match="3 of the 3 classes .* says nothing about new classes"):
        assert _classes(run_dir, split=str(split)) == classes["train"]


def test_nothing_is_asked_of_the_classes_of_train_and_val(tmp_path, monkeypatch):
    """A test may have more ways and shots than they allow, and they may be gone."""
    monkeypatch.chdir(tmp_path)
    run_dir, split = _save_untrained(tmp_path, (4,) * 5 + (8,) * 4, (3, 2, 4), "protonet")
    cases: list[dict[str, Any]] = [
        {"way": 4}, {"shot": 7}, {"way": 4, "shot": 7, "split": str(split)}
    ]  # fmt: skip
    for changes in cases:
        restored = reevaluate.restore(run_dir, num_test_tasks=2, **changes)
        way, shot = changes.get("way", 2), changes.get("shot", 1)
        support = next(scored_tasks(restored.experiment, "test", 2)).support
        assert support["inputs"].shape[1] == way * shot
        assert len(reevaluate.scores(restored, 2)) == 1
    with pytest.raises(ValueError, match="way=5 is more than the 4 classes of test"):
        reevaluate.restore(run_dir, num_test_tasks=2, way=5)
    for number in range(5):
        shutil.rmtree(tmp_path / "images" / f"class{number}")
    assert _classes(run_dir) == [f"class{i}" for i in range(5, 9)]


def test_the_dataset_of_the_run_by_another_name_has_the_classes_of_the_run(trained_on_a_folder):
    """Classes that are divided anew would have some of the training among those of the test."""
    run_dir, split = trained_on_a_folder
    classes = json.loads(split.read_text())
    for dataset in ("folder:images", f"folder:{run_dir.parent / 'images'}"):
        assert _classes(run_dir, dataset=dataset, way=2) == classes["test"]


def test_a_moved_or_copied_folder_has_the_classes_of_the_run(trained_on_a_folder):
    run_dir, split = trained_on_a_folder
    classes = json.loads(split.read_text())
    moved = (run_dir.parent / "images").rename(run_dir.parent / "moved")
    shutil.copytree(moved / "class0", moved / "more")
    assert _classes(run_dir, dataset="folder:moved") == classes["test"]


def test_a_folder_of_other_classes_is_tested_with_all_that_the_run_has_not_seen(
    trained_on_a_folder,
):
    run_dir = trained_on_a_folder[0]
    few = write_folder(run_dir.parent / "few", sizes=(4,) * 5)  # those of train and val
    with pytest.raises(
        ValueError, match="was trained or validated on all 5 classes of 'folder:few"
    ):
        _classes(run_dir, dataset="folder:few")
    for number in (1, 3, 4):
        (few / f"class{number}").rename(few / f"new{number}")
    assert _classes(run_dir, dataset="folder:few", way=2) == ["new1", "new3", "new4"]
    # A split that is given decides, and training classes in it are named.
    named = {"train": ["class2"], "val": ["new3"], "test": ["class0", "new1"]}
    class_splits.write(run_dir.parent / "few.json", named)
    with pytest.warns(
        UserWarning, match=r"1 of the 2 classes .* of the training \('class0'\): the"
    ):
        assert _classes(run_dir, dataset="folder:few", split="few.json") == named["test"]


@pytest.mark.parametrize(
    ("dataset", "is_in"),
    [(None, "data"), ("omniglot", "data"), ("tfds:mine", "data"), ("glyphs", None)],
)
def test_glyphs_are_not_made_in_the_directory_of_another_run(
    dataset, is_in, images, tmp_path, monkeypatch
):
    looked_in = []
    monkeypatch.setattr(datasets, "load", lambda _, place, *rest: looked_in.append(place) or images)
    preset, data = presets.override(PRESET, dataset="omniglot"), tmp_path / "data"
    run_dir = save_untrained(tmp_path / "run", preset, data_dir=data).path
    with pytest.warns(UserWarning, match="3 of the 5 classes of the test"):
        reevaluate.restore(run_dir, num_test_tasks=2, dataset=dataset)
    assert looked_in == [is_in and tmp_path / is_in]


def test_training_classes_in_a_test_of_another_published_split_are_counted():
    finn, vinyals = (class_splits.omniglot(name) for name in ("finn", "vinyals"))
    with pytest.warns(
        UserWarning, match="274 of the 423 classes of the test are classes of the tr"
    ):
        unseen.warn_of_seen(vinyals["test"], finn)
    unseen.warn_of_seen(finn["test"], finn)


def test_a_test_with_more_shots_need_not_fit_the_query_of_training(trained_on_a_folder):
    restored = reevaluate.restore(trained_on_a_folder[0], num_test_tasks=2, shot=3)
    support = next(scored_tasks(restored.experiment, "test", 2)).support
    assert support["inputs"].shape[1] == 2 * 3


def test_a_run_is_evaluated_from_another_directory(trained_on_a_folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    restored = reevaluate.restore(trained_on_a_folder[0], num_test_tasks=2)
    assert restored.trained.dataset == f"folder:{tmp_path / 'images'}"
    assert restored.trained.split == str(tmp_path / "split.json")
