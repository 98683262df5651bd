"""The run directory: what is written is read back, whole or not at all, never over another run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiny import REGRESSION
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.run_dir import (
    RunDir,
    make_config,
    make_results,
    preset_of,
    specs_of,
    to_json,
    write_json,
)
from jaxmaml.types import MetaState

SPECS = [Spec("exact@0.1", "exact", 0.1, "maml"), Spec("anil", "exact", 0.2, "anil")]


def _config():
    return make_config(
        REGRESSION, SPECS,
        seed=3, num_test_tasks=5, data_dir=None, matmul_precision="highest",
        input_shape=(1,), num_classes=0,
    )  # fmt: skip


def test_the_config_is_read_back(tmp_path):
    directory = RunDir(tmp_path / "run")
    directory.create(_config())
    config = directory.read_config()
    assert preset_of(config) == REGRESSION
    assert specs_of(config) == SPECS
    assert list(config) == [
        "preset", "runs", "seed", "num_test_tasks", "data_dir", "matmul_precision",
        "input_shape", "num_classes", "versions", "commit",
    ]  # fmt: skip
    assert list(config["runs"][0]) == ["label", "order", "inner_lr", "learner"]


def test_results_are_the_stable_interface(compared):
    comparison, runs = compared
    gradient = {"cosine": [1.0], "norm_ratio": [1.0], "step": [0]}
    results = make_results(comparison.config, runs, floor=None, gradient=gradient)
    assert list(results) == [
        "preset", "seed", "num_test_tasks", "device", "versions", "commit",
        "matmul_precision", "compute_dtype", "floor", "runs", "gradient",
    ]  # fmt: skip
    assert results["floor"] == {"nearest_neighbour": None}
    assert list(results["runs"]["exact"]) == [
        "mse_per_step", "ci95_per_step", "nearest_neighbour_on_features", "num_nonfinite",
        "seconds_per_outer_step", "compile_seconds", "temp_bytes", "flops", "num_outer_steps",
        "inner_lr",
    ]  # fmt: skip
    stored = json.loads(comparison.run_dir.results.read_text())
    assert stored["runs"] == to_json(results["runs"])


def test_another_run_is_not_overwritten(tmp_path):
    directory = RunDir(tmp_path)
    directory.create(_config())
    with pytest.raises(ValueError, match=r"holds another run \(config.json\)"):
        directory.create(_config())
    directory.config.rename(directory.results)
    with pytest.raises(ValueError, match=r"holds another run \(results.json\)"):
        directory.check_vacant()
    with pytest.raises(ValueError, match="is a file"):
        RunDir(directory.results).check_vacant()


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
        directory.save_state(label, state)
    for label, state in states.items():
        found = directory.restore_state(label, jax.tree.map(jnp.zeros_like, state))
        jax.tree.map(np.testing.assert_array_equal, found, state)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["exact", "first"]


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        RunDir(tmp_path).read_config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
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
