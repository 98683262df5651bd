"""The contents of results.json: the scores and costs of the runs of a directory."""

from collections.abc import Iterable
from typing import Any

from jaxmaml.experiments import provenance
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.references import KEYS, Reference
from jaxmaml.experiments.run import Run
from jaxmaml.experiments.run_dir import Gradient, preset_of
from jaxmaml.experiments.scoring import Score
from jaxmaml.experiments.seeds import over_seeds


def make_results(
    config: dict[str, Any],
    runs: Iterable[Run],
    *,
    reference: Reference | None,
    gradient: Gradient | None,
) -> dict[str, Any]:
    """Returns the contents of results.json.

    Args:
        config: the contents of config.json.
        runs: the runs.
        reference: what the scores are compared with; None for regression.
        gradient: first-order against exact meta-gradients; None if they were not compared.
    """
    preset, runs = preset_of(config), list(runs)
    return {
        "preset": preset.name,
        "seed": config["seed"],
        "num_test_tasks": config["num_test_tasks"],
        "device": provenance.device(),
        "versions": config["versions"],
        "commit": config["commit"],
        "matmul_precision": config["matmul_precision"],
        "compute_dtype": preset.compute_dtype,
        "floor": {
            KEYS.get(preset.domain, "nearest_neighbour"): reference and reference.value,
        },
        "runs": {run.label: _run_results(preset, run, config["seed"]) for run in runs},
        "gradient": gradient,
        "seeds": _seed_results(preset, runs) or None,
    }


def _seed_results(preset: Preset, runs: list[Run]) -> dict[str, Any]:
    """Returns the mean and the standard deviation over seeds of each learner; {} for one seed."""
    scores = {key: score for run in runs for key, score in run.scores().items()}
    return {
        name: {
            "seeds": found.seeds,
            preset.metric.key: found.mean,
            "std_per_step": found.std,
        }
        for name, found in over_seeds(scores).items()
    }


def _run_results(preset: Preset, run: Run, seed: int) -> dict[str, Any]:
    return {
        **_test_results(preset, run.test),
        "nearest_neighbour_on_features": run.on_features,
        "num_nonfinite": run.test.num_nonfinite,
        "seconds_per_outer_step": run.seconds_per_outer_step,
        "compile_seconds": run.compile_seconds,
        "temp_bytes": run.temp_bytes,
        "flops": run.flops,
        "num_outer_steps": run.num_outer_steps,
        "inner_lr": run.candidate.spec.inner_lr,
        "seed": seed if run.candidate.spec.seed is None else run.candidate.spec.seed,
        "selected_step": int(run.meta_state.step),
        "num_skipped": run.num_skipped,
        "num_rejected": run.num_rejected,
        "stopped": run.stopped or None,
        "stopped_early": run.stopped_early,
        "averaged": None if run.averaged is None else {
            "steps": [int(state.step) for state in run.averaged_states],
            **_test_results(preset, run.averaged),
            "num_nonfinite": run.averaged.num_nonfinite,
        },
    }  # fmt: skip


def _test_results(preset: Preset, test: Score) -> dict[str, Any]:
    return {
        preset.metric.key: test.mean,
        "ci95_per_step": test.ci95,
    }
