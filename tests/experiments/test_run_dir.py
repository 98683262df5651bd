"""The run directory: what is written is read back, whole or not at all, never over another run."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiny import REGRESSION, SPECS, regression_config
from jaxmaml import files
from jaxmaml.experiments import run_dir
from jaxmaml.experiments.run_dir import (
    PLOTS,
    RunDir,
    preset_of,
    specs_of,
    write_json,
)
from jaxmaml.types import MetaState


def test_the_config_is_read_back(tmp_path):
    directory = RunDir(tmp_path / "run")
    directory.create(regression_config())
    config = directory.read_config()
    assert preset_of(config) == REGRESSION
    assert specs_of(config) == SPECS
    assert list(config) == [
        "preset", "num_seeds", "runs", "seed", "num_test_tasks", "data_dir", "matmul_precision",
        "input_shape", "class_split", "class_sizes", "versions", "commit", "digest",
    ]  # fmt: skip
    assert list(config["runs"][0]) == ["label", "order", "inner_lr", "learner", "seed"]


def test_another_run_is_not_overwritten(tmp_path):
    directory = RunDir(tmp_path)
    directory.create(regression_config())
    with pytest.raises(ValueError, match=r"holds another run \(config.json\)"):
        directory.create(regression_config())
    with pytest.raises(ValueError, match="is a file"):
        RunDir(directory.config).check_vacant()


@pytest.mark.parametrize(
    "name",
    ["results.json", "metrics.jsonl", "checkpoints", "training", *(f"{p}.png" for p in PLOTS)],
)
def test_a_directory_with_files_of_a_run_and_no_config_is_refused(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds another run .{name}"), RunDir(tmp_path).claimed():
        pass


def test_a_claim_that_writes_nothing_leaves_nothing(tmp_path):
    with RunDir(tmp_path / "a" / "b").claimed():
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".lock").touch()  # of a process that was killed
    with RunDir(tmp_path).claimed():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(files.WriteError, match=r"file/run/\.lock cannot be written"),
        RunDir(tmp_path / "file" / "run").claimed(),
    ):
        pass


LIMITED = """
import pathlib, resource, signal, sys
from jaxmaml.experiments.run_dir import RunDir
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
directory = RunDir(pathlib.Path(sys.argv[1]))
directory.append_metrics([{"step": 0}])
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
directory.append_metrics([{"step": 1}])
"""


@pytest.mark.slow
def test_no_row_of_metrics_is_cut_where_the_disk_is_full(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "WriteError" in done.stderr
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_metrics_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(files.WriteError, match=r"metrics.jsonl cannot be written: .*No space"):
        RunDir(tmp_path).append_metrics([{"step": 0}])


def test_rows_are_appended(tmp_path):
    directory = RunDir(tmp_path)
    directory.append_metrics([{"step": 0, "loss": np.float32(1.5)}])
    directory.append_metrics([{"step": 1, "loss": np.nan}, {"step": 2, "loss": jnp.inf}])
    rows = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert rows == [
        {"step": 0, "loss": 1.5}, {"step": 1, "loss": None}, {"step": 2, "loss": None}
    ]  # fmt: skip


def test_states_are_kept_by_label(tmp_path):
    directory = RunDir(tmp_path)
    states = {
        label: MetaState(jnp.full(2, value), (), jnp.array(step))
        for label, value, step in (("exact", 1.0, 3), ("first", 2.0, 4))
    }
    for label, state in states.items():
        directory.save_state(label, state, regression_config())
    for label, state in states.items():
        found = directory.restore_state(
            label, jax.tree.map(jnp.zeros_like, state), regression_config()
        )
        jax.tree.map(np.testing.assert_array_equal, found, state)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["exact", "first"]
    # Neither another run's state nor one of other settings passes for it.
    with pytest.raises(ValueError, match="another configuration"):
        directory.restore_state("exact", states["exact"], {**regression_config(), "seed": 4})
    directory.verify_state("exact", {**regression_config(), "versions": {}, "commit": None})
    directory.checkpoint("first").rename(tmp_path / "first")
    directory.checkpoint("exact").rename(directory.checkpoint("first"))
    with pytest.raises(ValueError, match="another configuration"):
        directory.verify_state("first", regression_config())


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        RunDir(tmp_path).read_config()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match="holds no run"):
        RunDir(tmp_path).read_config()


def _without(name):
    return {key: value for key, value in regression_config().items() if key != name}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        (b"\xff{}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        *((text, "is not as it was written") for text in ("", "[]", "3", '"a"', "null", "{}")),
        *((json.dumps(_without(key)), "is not as it was written") for key in regression_config()),
        (json.dumps({**regression_config(), "seed": 4}), "is not as it was written"),
        (json.dumps({**regression_config(), "seed": "3"}), "is not as it was written"),
    ],
)
def test_a_damaged_config_is_refused_by_its_name(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = "is not JSON" if text == "" else message
    with pytest.raises(ValueError, match=f"config.json {message}"):
        RunDir(tmp_path).read_config()


@pytest.mark.parametrize("changes", [{"preset": {"ways": 5}}, {"runs": [{"seed": 1}]}])
def test_a_config_of_another_version_is_refused(changes, tmp_path):
    config = {**regression_config(), **changes}
    write_json(tmp_path / "config.json", {**config, "digest": run_dir._digest(config)})
    with pytest.raises(ValueError, match=r"config.json is of another version"):
        RunDir(tmp_path).read_config()


def test_json_has_null_and_never_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": np.array([1.0, np.nan]), "b": jax.numpy.inf})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.0, None], "b": None}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert json.loads(path.read_text()) == {"a": 1}
