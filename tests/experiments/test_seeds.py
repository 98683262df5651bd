"""Runs over several seeds: their own starts and episodes, shared programs, mean and spread."""

import json

import jax
import numpy as np
import pytest
from rich.console import Console

from experiments.tiny import REGRESSION, interrupted_after
from jaxmaml import dispatch, fitting
from jaxmaml.experiments import candidates, compare, figures, reevaluate
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import (
    build_candidate,
    build_experiment,
    init_state,
    with_seed,
)

SINGLE = [Spec("first", "first", 0.01)]


@pytest.fixture(autouse=True, scope="module")
def _no_plots():
    """Draws nothing, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_all", lambda *args, **options: [])
        yield


def _execute(out, specs=SINGLE, **options):
    with compare.prepare(
        REGRESSION, specs, out, num_test_tasks=5, checkpoint_every=1, **options
    ) as comparison:
        return comparison, compare.execute(comparison)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """(run directory, runs) of one learner with the seeds 3 and 4."""
    out = tmp_path_factory.mktemp("seeds") / "run"
    return out, _execute(out, seed=3, num_seeds=2)[1]


def _losses(out, label):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["label"] == label and "loss" in row]


def test_each_seed_is_the_run_that_it_would_be_alone(seeds, tmp_path):
    out, runs = seeds
    _, (alone,) = _execute(tmp_path / "alone", seed=4)
    assert _losses(out, "first, seed 4") == _losses(tmp_path / "alone", "first")
    assert _losses(out, "first, seed 3") != _losses(out, "first, seed 4")
    np.testing.assert_array_equal(runs[1].test.mean, alone.test.mean)
    jax.tree.map(np.testing.assert_array_equal, runs[1].meta_state, alone.meta_state)


def test_the_results_hold_the_mean_and_the_spread_over_seeds(seeds):
    out, runs = seeds
    results = json.loads((out / "results.json").read_text())
    assert [run["seed"] for run in results["runs"].values()] == [3, 4]
    found = results["seeds"]["first"]
    means = [run.test.mean for run in runs]
    assert found["seeds"] == [3, 4]
    np.testing.assert_allclose(found["mse_per_step"], np.mean(means, axis=0))
    np.testing.assert_allclose(found["std_per_step"], np.std(means, axis=0, ddof=1))


def test_evaluate_shows_every_seed_and_their_mean(seeds):
    out, runs = seeds
    restored = reevaluate.restore(out, num_test_tasks=5)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(reevaluate.scores_table(restored, 5))
    shown, means = capture.get(), [run.test.mean[2] for run in runs]
    for mean in means:
        assert f"{mean:.3f} ±" in shown
    assert "mean ± standard deviation over 2 seeds, each on 5 tasks" in shown
    assert f"{np.mean(means):.3f} ± {np.std(means, ddof=1):.3f}" in shown


def test_the_programs_of_the_first_seed_serve_the_others(monkeypatch):
    """The functions are the same objects, and what depends on the seed is an argument."""
    built = build_experiment(REGRESSION, seed=3, num_test_tasks=5)
    specs = candidates.for_each_seed([Spec("a", "first", 0.01, "cavia")], 3, 2)
    first, second = compare._build(built, specs)
    assert first.learner is second.learner
    assert first.model is second.model
    other = with_seed(built, 4)
    alone = build_experiment(REGRESSION, seed=4, num_test_tasks=5)
    jax.tree.map(np.testing.assert_array_equal, other.network.params, alone.network.params)
    assert other.sources is built.sources

    # The outer steps of both seeds are the same program, which the compilation cache knows.
    texts = []

    def lower(function, mesh, *args):
        texts.append(jax.jit(function).lower(*args).as_text())
        return None, 0.0, None

    monkeypatch.setattr(dispatch, "_compile", lower)
    for experiment in (built, other):
        start = init_state(experiment, build_candidate(experiment, specs[0]))
        fitting.compile_program(
            first.learner, experiment.optimizer, start, experiment.sources["train"],
            key=experiment.train_key,
        )  # fmt: skip
    assert texts[0] == texts[1]


def test_each_seed_is_continued(seeds, tmp_path, capsys):
    out, whole = tmp_path / "run", seeds[0]
    with interrupted_after(8):
        _execute(out, seed=3, num_seeds=2)
    _execute(out, seed=3, num_seeds=2)
    assert "first, seed 4: continues from outer step" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    found, expected = (json.loads((path / "results.json").read_text()) for path in (out, whole))
    assert found["seeds"] == expected["seeds"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_seeds": 0}, "num_seeds must be an integer, 1 or more; got 0"),
        ({"num_seeds": 10**9}, "num_seeds must be at most 1,000; got 1000000000"),
        (
            {"seed": 2**32 - 2, "num_seeds": 3},
            r"seed \+ num_seeds - 1 must be at most 4,294,967,295",
        ),
        ({"seed": 3, "num_seeds": 3}, "num_seeds is 2 there and 3 here"),
    ],
)
def test_wrong_numbers_of_seeds_are_refused(options, message, seeds):
    prepared = compare.prepare(REGRESSION, SINGLE, seeds[0], num_test_tasks=5, **options)
    with pytest.raises(ValueError, match=message), prepared:
        pass
