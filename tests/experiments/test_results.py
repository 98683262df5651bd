"""results.json: its keys are a stable interface."""

import json

from jaxmaml.experiments.results import make_results
from jaxmaml.experiments.run_dir import to_json


def test_results_are_the_stable_interface(compared):
    comparison, runs = compared
    gradient = {"cosine": [1.0], "norm_ratio": [1.0], "step": [0]}
    results = make_results(comparison.config, runs, reference=None, gradient=gradient)
    assert list(results) == [
        "preset", "seed", "num_test_tasks", "device", "versions", "commit",
        "matmul_precision", "compute_dtype", "floor", "runs", "gradient", "seeds",
    ]  # fmt: skip
    assert results["floor"] == {"nearest_neighbour": None}
    assert list(results["runs"]["exact"]) == [
        "mse_per_step", "ci95_per_step", "nearest_neighbour_on_features", "num_nonfinite",
        "seconds_per_outer_step", "compile_seconds", "temp_bytes", "flops", "num_outer_steps",
        "inner_lr", "seed", "selected_step", "num_skipped", "num_rejected", "stopped",
        "stopped_early", "averaged",
    ]  # fmt: skip
    stored = json.loads(comparison.run_dir.results.read_text())
    assert stored["runs"] == to_json(results["runs"])
