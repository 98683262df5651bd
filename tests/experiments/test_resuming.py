"""A run directory is continued by the same command, to the same end as if never interrupted."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.tiny import AGENT, PRESET, REGRESSION, interrupted_after
from jaxmaml import dispatch, fitting
from jaxmaml.checkpoint import Manager
from jaxmaml.commands import training
from jaxmaml.experiments import candidates, compare, experiment, figures, presets, settings
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.run_dir import RunDir, trained_for
from jaxmaml.experiments.scoring import scored_part
from jaxmaml.experiments.tasks import Streaming

PAIR = candidates.comparison(REGRESSION)
"""Exact and first-order MAML."""
SINGLE = PAIR[1:]
TIMES = ("seconds_per_outer_step", "compile_seconds")
"""Keys of results.json that differ between two executions of the same run."""


@pytest.fixture(autouse=True, scope="module")
def _no_plots():
    """Draws nothing, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_all", lambda *args, **options: [])
        yield


def _execute(out, preset=REGRESSION, specs=SINGLE, **options):
    with compare.prepare(
        preset, specs, out, num_test_tasks=5, checkpoint_every=1, **options
    ) as comparison:
        return comparison, compare.execute(comparison)


def _interrupted(out, num_slices, *args, **options):
    with interrupted_after(num_slices):
        _execute(out, *args, **options)


def _results(out):
    results = json.loads((out / "results.json").read_text())
    for run in results["runs"].values():
        for name in TIMES:
            del run[name]
    return results


def _losses(out, label):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["label"] == label and "loss" in row]


def _check_equal(found, expected, spec, preset=REGRESSION):
    """Checks the metrics, the results, the final states and all of the training's last checkpoint."""
    assert (found / "metrics.jsonl").read_text() == (expected / "metrics.jsonl").read_text()
    assert _results(found) == _results(expected)
    assert (found / "config.json").read_text() == (expected / "config.json").read_text()
    found, expected = (_last(out, spec, preset) for out in (found, expected))
    jax.tree.map(np.testing.assert_array_equal, found.state, expected.state)
    for name in ("curve", "best_scores", "num_skipped", "stopped_early"):
        assert found.record[name] == expected.record[name]


def _last(out, spec, preset):
    """Returns the last checkpoint of a training."""
    config = json.loads((out / "config.json").read_text())
    built = experiment.build_experiment(preset, seed=0, num_test_tasks=5)
    start = experiment.init_state(built, experiment.build_candidate(built, spec))
    num_best = min(preset.num_averaged, preset.num_validations + 1)
    like = {
        "state": start,
        "good": start,
        "selected": start,
        "best": [scored_part(start)] * num_best,
    }
    config = trained_for(spec.label, config)
    found = Manager(out / "training" / spec.label, config=config).restore(like)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    _execute(out)
    return out


@pytest.mark.slow
def test_a_comparison_that_is_interrupted_ends_as_one_that_is_not(tmp_path, capsys):
    out, whole = tmp_path / "run", tmp_path / "whole"
    _execute(whole, specs=PAIR)
    for num_slices in (2, 1, 6):  # in the first run, there again, and in the second run
        _interrupted(out, num_slices, specs=PAIR)
    capsys.readouterr()
    _execute(out, specs=PAIR)
    said = capsys.readouterr().err
    assert "exact: continues from outer step 6 of 6" in said
    assert "first: continues from outer step 3 of 6" in said
    for spec in PAIR:
        _check_equal(out, whole, spec)
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_rows_after_the_checkpoint_are_made_again(whole, tmp_path):
    """A process that is killed has written rows of steps that no checkpoint holds."""
    out = tmp_path / "run"
    _interrupted(out, 3)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"label": "first", "step": 3, "loss": 7.0}\n{"label": "first", "step": 6, "val')
    (out / ".metrics.jsonl.0123abcd").touch()
    (out / "training" / "first" / "000000004.orbax-checkpoint-tmp").mkdir()
    _execute(out)
    _check_equal(out, whole, SINGLE[0])
    assert not list(out.glob(".*"))
    assert not list(out.glob("training/*/*tmp*"))


def test_a_run_goes_on_after_the_documentation_of_its_preset_has_changed(whole, tmp_path):
    out = tmp_path / "run"
    _interrupted(out, 3)
    newer = dict.fromkeys(settings.DOCUMENTATION, "another text")
    _execute(out, dataclasses.replace(REGRESSION, **newer))
    _check_equal(out, whole, SINGLE[0])


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(
    whole, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Manager, "save", lambda *args, **options: None)
        _interrupted(out, 3)
    assert not (out / "training").exists()
    assert (out / "metrics.jsonl").read_text()
    _execute(out)
    _check_equal(out, whole, SINGLE[0])


def test_a_damaged_checkpoint_leads_to_the_one_before_it(whole, tmp_path, capsys):
    out = tmp_path / "run"
    _interrupted(out, 3)
    newest = out / "training" / "first" / "000000003" / "_METADATA"
    newest.write_bytes(newest.read_bytes()[:-1])
    capsys.readouterr()
    _execute(out)
    said = capsys.readouterr().err
    assert "_METADATA is damaged" in said
    assert "first: continues from outer step 2 of 6" in said
    _check_equal(out, whole, SINGLE[0])


VALIDATED = presets.override(
    REGRESSION, num_validations=6, selection_steps=(1,), num_averaged=2, patience=3, outer_lr=10.0
)
"""The parameters are ruined at once, and training stops after three of six steps."""


def test_a_run_that_stopped_early_ends_as_one_that_is_not_interrupted(tmp_path):
    out, whole = tmp_path / "run", tmp_path / "whole"
    _execute(whole, VALIDATED)
    for num_slices in (1, 1):
        _interrupted(out, num_slices, VALIDATED)
    _, (run,) = _execute(out, VALIDATED)
    assert (run.num_outer_steps, run.stopped_early) == (3, True)
    _check_equal(out, whole, SINGLE[0], VALIDATED)
    states, expected = (
        RunDir(path).restore_averaged(
            "first", run.averaged_states[0], json.loads((path / "config.json").read_text())
        )
        for path in (out, whole)
    )
    assert len(states) == 2
    jax.tree.map(np.testing.assert_array_equal, states, expected)

    # It is complete, also after an interruption of its test, and cannot be made longer.
    with compare.prepare(VALIDATED, SINGLE, out, num_test_tasks=5) as comparison:
        assert comparison.is_complete
    (out / "results.json").unlink()
    _execute(out, VALIDATED)
    _check_equal(out, whole, SINGLE[0], VALIDATED)
    longer = presets.override(VALIDATED, num_outer_steps=9)
    prepared = compare.prepare(longer, SINGLE, out, num_test_tasks=5)
    with (
        pytest.raises(ValueError, match="num_outer_steps cannot be raised with patience=3"),
        prepared,
    ):
        pass


def _only_once(source, once, key):
    """Draws tasks that are finite for one key only."""
    is_once = jnp.all(jax.random.key_data(key) == once)
    return jax.tree.map(lambda leaf: jnp.where(is_once, leaf, jnp.nan), source(key))


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_the_last_good_state_survives_an_interruption(on_nonfinite, tmp_path, monkeypatch):
    """The second update gives parameters whose loss is not finite, which only the next step shows."""
    preset = presets.override(REGRESSION, on_nonfinite=on_nonfinite)
    rates = optax.sgd(lambda count: jnp.where(count == 1, 1e30, 1e-3))
    monkeypatch.setattr(experiment, "outer_optimizer", lambda *_: rates)
    monkeypatch.setattr(dispatch, "MAX_SKIPS", 3)
    out, whole, run_slices = tmp_path / "run", tmp_path / "whole", fitting.run_slices

    def interrupted(*args, **options):
        yield from itertools.islice(run_slices(*args, **options), 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "run_slices", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _execute(out, preset)
    for path in (out, whole):
        _, (run,) = _execute(path, preset)
        assert "loss is" in run.stopped
        assert int(run.meta_state.step) == 1
        assert np.isfinite(run.test.mean[0])
    _check_equal(out, whole, SINGLE[0], preset)


def test_skips_are_counted_across_an_interruption(tmp_path, monkeypatch):
    """All steps but the first are skipped, one less than those that would end the run."""
    preset = presets.override(REGRESSION, on_nonfinite="skip")
    make = experiment.build_experiment

    def poisoned(*args, **options):
        built = make(*args, **options)
        first = jax.random.key_data(jax.random.fold_in(built.train_key, 0))
        source = jax.tree_util.Partial(_only_once, built.sources["train"], first)
        return built._replace(sources={**built.sources, "train": source})

    monkeypatch.setattr(compare, "build_experiment", poisoned)
    out, whole = tmp_path / "run", tmp_path / "whole"
    for num_slices in (2, 2):
        _interrupted(out, num_slices, preset)
    for path in (out, whole):
        _, (run,) = _execute(path, preset)
        assert (run.num_outer_steps, run.num_skipped, run.stopped) == (6, 5, "")
    _check_equal(out, whole, SINGLE[0], preset)


@pytest.mark.slow
def test_a_run_that_stopped_stays_stopped(tmp_path):
    out, specs = tmp_path / "run", [Spec("first", "first", 1e30)]
    _, (before,) = _execute(out, specs=specs)
    rows = (out / "metrics.jsonl").read_text()
    results = _results(out)
    (out / "results.json").unlink()  # as if it had been killed during the test
    _, (after,) = _execute(out, specs=specs)
    assert before.stopped == after.stopped != ""
    assert (out / "metrics.jsonl").read_text() == rows
    assert _results(out) == results


def test_a_run_can_be_made_longer(whole, tmp_path):
    out = tmp_path / "run"
    shorter = presets.override(REGRESSION, num_outer_steps=3)
    _execute(out, shorter)
    assert (out / "results.json").exists()
    _execute(out)
    for spec in SINGLE:
        found, expected = (_last(path, spec, REGRESSION) for path in (out, whole))
        jax.tree.map(np.testing.assert_array_equal, found.state, expected.state)
        losses, expected = (_losses(path, spec.label) for path in (out, whole))
        assert losses == expected
    assert _results(out) == _results(whole)
    with pytest.raises(ValueError, match="num_outer_steps is 6 there and 3 here"):
        _execute(out, shorter)


def test_a_complete_run_is_left_alone(whole):
    times = lambda: {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    before = times()
    with compare.prepare(REGRESSION, SINGLE, whole, num_test_tasks=5) as comparison:
        assert comparison.is_complete
    assert times() == before


@pytest.mark.parametrize(
    ("changes", "specs", "options", "message"),
    [
        ({"outer_lr": 0.5}, SINGLE, {}, r"outer_lr is 0\.001 there and 0\.5 here"),
        ({}, PAIR, {}, "runs is "),
        ({}, SINGLE, {"seed": 3}, "seed is 0 there and 3 here"),
        # More steps may be asked for, and the runs follow from the settings.
        ({"num_outer_steps": 9}, SINGLE, {"seed": 3}, "only: seed is 0 there and 3 here; name"),
        ({"num_outer_steps": 5}, SINGLE, {}, "num_outer_steps is 6 there and 5 here"),
        ({"inner_lr": 0.5}, PAIR, {}, r"only: inner_lr is 0\.01 there and 0\.5 here; name"),
    ],
)
def test_another_run_is_refused_by_its_difference(changes, specs, options, message, whole):
    preset = presets.override(REGRESSION, **changes)
    prepared = compare.prepare(preset, specs, whole, num_test_tasks=5, **options)
    with pytest.raises(ValueError, match=message), prepared:
        pass


@pytest.mark.parametrize(
    ("changes", "specs", "message"),
    [
        ({"outer_schedule": "cosine"}, PAIR[:1], "with outer_schedule='cosine'"),
        ({}, [Spec("mpp", "exact", 0.01, "maml_plus_plus")], "with learner 'maml_plus_plus'"),
        ({"patience": 2, "selection_steps": (1,)}, PAIR[:1], "with patience=2, whose validations"),
    ],
)
def test_a_schedule_over_all_steps_cannot_be_made_longer(changes, specs, message, tmp_path, capsys):
    out, preset = tmp_path / "run", presets.override(REGRESSION, **changes)
    with compare.prepare(preset, specs, out, num_test_tasks=5) as comparison:
        comparison.run_dir.create(comparison.config)
    longer = compare.prepare(
        presets.override(preset, num_outer_steps=9), specs, out, num_test_tasks=5
    )
    with pytest.raises(ValueError, match=message), longer:
        pass
    with compare.prepare(preset, specs, out, num_test_tasks=5) as comparison:
        assert comparison.is_resumed

    # Nor is it said to be one that can.
    (out / "results.json").write_text('{"runs": {}}')
    assert training._say_complete(comparison) == 0
    assert capsys.readouterr().out == f"{out} is complete\n"


IMAGES = presets.override(PRESET, num_outer_steps=6, num_validations=2, selection_steps=(1,))
SOURCES = {
    "pool": (IMAGES, "maml", None),
    "stream": (IMAGES, "maml", Streaming(num_workers=2, cache=False)),
    "state": (presets.override(IMAGES, norm="per_step"), "maml_plus_plus", None),
    "policy": (AGENT, "maml", None),
    "trust region": (presets.override(AGENT, outer="trpo"), "maml", None),
    "average": (presets.override(REGRESSION, averaging=0.9, selection_steps=(1,)), "maml", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SOURCES)
def test_every_kind_of_source_and_state_is_continued(what, small_datasets, tmp_path):
    preset, learner, streaming = SOURCES[what]
    specs = [Spec("run", "exact", 0.1, learner)]
    for num_slices in (2, 2):
        _interrupted(tmp_path / "run", num_slices, preset, specs, streaming=streaming)
    for out in ("run", "whole"):
        _execute(tmp_path / out, preset, specs, streaming=streaming)
    _check_equal(tmp_path / "run", tmp_path / "whole", specs[0], preset)
