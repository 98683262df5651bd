"""Tables: the numbers of the runs, in an 80-column terminal."""

import dataclasses
import pathlib

import numpy as np
import pytest
from rich.console import Console

from experiments.tiny import PRESET, REGRESSION
from jaxmaml.data.preparation import Prepared
from jaxmaml.experiments import presets, tables
from jaxmaml.experiments.candidates import Spec, for_each_seed
from jaxmaml.experiments.references import named
from jaxmaml.experiments.scoring import Score
from jaxmaml.experiments.seeds import SeedScore


def _shown(table, width=80):
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]


def _score(*mean, headline=1, num_nonfinite=0):
    return Score(np.array(mean), np.full(len(mean), 0.01), num_nonfinite, headline)


@pytest.fixture
def many(compared):
    """Five runs with known scores: two learners, at two rates and at one."""
    base = compared[1][0]
    known = {
        "exact@0.1": (0.3, ("maml", "exact", 0.1)), "exact@1": (0.2, ("maml", "exact", 1.0)),
        "first@0.1": (0.5, ("maml", "first", 0.1)), "first@1": (np.nan, ("maml", "first", 1.0)),
        "anil@0.1": (0.4, ("anil", "exact", 0.1)),
    }  # fmt: skip
    runs = []
    for label, (mse, (learner, order, rate)) in known.items():
        candidate = base.candidate._replace(spec=Spec(label, order, rate, learner))
        score = _score(1.0, mse)
        runs.append(base._replace(candidate=candidate, curve=[(0, score)], test=score, flops=2e9))
    return runs


def test_scores_have_a_row_per_inner_step():
    scores = {"exact": _score(0.2, 0.805), "first": _score(0.2, 0.7, num_nonfinite=3)}
    lines = _shown(tables.scores_table(PRESET, scores, 600, named("classification", 0.41)))
    assert "glyphs-5w1s, way=3, shot=2: test accuracy, %, 95 % CI over 600 tasks" in lines[0]
    rows = [line.split("  ") for line in lines[3:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells == [
        ["0", "20.0 ± 1.0", "20.0 ± 1.0"],
        ["1 (headline)", "80.5 ± 1.0", "70.0 ± 1.0"],
        ["nearest neighbor, pixels", "41.0", "41.0"],
        ["tasks not finite", "0", "3"],
    ]


def test_a_shorter_run_has_empty_cells_and_no_common_headline():
    scores = {"maml": _score(0.2, 0.8), "protonet": _score(0.9, headline=0)}
    lines = _shown(tables.scores_table(PRESET, scores, 600, None))
    assert lines[-1].split() == ["1", "80.0", "±", "1.0"]
    assert not any("headline" in line for line in lines)


def test_the_costs_are_appended(compared):
    _, runs = compared
    table = tables.scores_table(REGRESSION, {run.label: run.test for run in runs}, 5, None)
    tables.add_features(table, runs)
    tables.add_costs(table, REGRESSION, runs)
    lines = _shown(table)
    assert not any("features" in line for line in lines)
    (flops,) = (line for line in lines if "GFLOP" in line)
    assert f"{runs[0].flops / 1e9:.3g}" in flops
    assert not any("selected by validation" in line for line in lines)


def test_the_selected_step_is_stated_if_it_is_not_the_last(compared):
    _, (run, _) = compared
    early = run._replace(meta_state=run.meta_state._replace(step=np.int32(3)))
    table = tables.scores_table(REGRESSION, {run.label: run.test}, 5, None)
    tables.add_costs(table, REGRESSION, [early])
    (selected,) = (line for line in _shown(table) if "selected by validation" in line)
    assert selected.split()[-1] == "3"


def test_many_runs_have_a_row_each(many):
    lines = _shown(tables.summary_table(REGRESSION, many, 5, None), width=120)
    rows = [line.split() for line in lines if line.split()[0] in {run.label for run in many}]
    assert [row[0] for row in rows] == [run.label for run in many]
    one, three, fails = ["1.000", "±", "0.010"], ["0.300", "±", "0.010"], ["not", "finite"]
    # After 0 steps, after 1 step, the number of steps, and the headline.
    assert rows[0][1:11] == [*one, *three, "1", *three]
    assert rows[3][1:9] == [*one, *fails, "1", *fails]
    assert all(row[-1] == "2" for row in rows)


def test_each_learner_is_quoted_at_its_best_rate(many):
    assert tables.best_line(REGRESSION, many) == (
        "each at its best rate (chosen on validation tasks): exact@1 0.200 ± 0.010, "
        "first@0.1 0.500 ± 0.010, anil@0.1 0.400 ± 0.010"
    )
    # Accuracy is better if it is higher, and a run that stopped is never the best.
    assert "exact@0.1" in tables.best_line(PRESET, many)
    stopped = [run._replace(stopped="outer step 3" * (run.label == "exact@1")) for run in many]
    assert "exact@0.1" in tables.best_line(REGRESSION, stopped)


def test_rates_are_compared_by_their_mean_over_seeds(many):
    runs = []
    for base, errors in ((many[0], (0.1, 0.9)), (many[1], (0.3, 0.5))):
        for spec, error in zip(for_each_seed([base.candidate.spec], 0, 2), errors, strict=True):
            score = _score(1.0, error)
            candidate = base.candidate._replace(spec=spec)
            runs.append(base._replace(candidate=candidate, curve=[(0, score)], test=score))
    assert tables.best_line(REGRESSION, runs).endswith(": exact@1 0.400 ± 0.141")


def test_what_ended_or_interrupted_a_training_is_stated(many):
    runs = [many[0]._replace(stopped_early=True), many[1]._replace(num_skipped=1234)]
    table = tables.scores_table(REGRESSION, {run.label: run.test for run in runs}, 5, None)
    tables.add_costs(table, REGRESSION, runs)
    (steps,) = (line.split() for line in _shown(table) if "outer steps" in line)
    assert steps[-3:] == ["6", "(patience)", "6"]
    (left_out,) = (line.split() for line in _shown(table) if "left out" in line)
    assert left_out[-2:] == ["0", "1,234"]


def test_the_mean_of_predictions_has_a_row_or_a_column(many):
    run = many[0]._replace(averaged=_score(1.0, 0.25), averaged_states=[many[0].meta_state] * 5)
    assert list(run.scores().values()) == [run.test, run.averaged]
    lines = _shown(tables.summary_table(REGRESSION, [run], 5, None), width=160)
    (row,) = (line.split() for line in lines if "mean of 5" in line)
    assert row[4:] == ["1.000", "±", "0.010", "0.250", "±", "0.010", "1", "0.250", "±", "0.010"]


def test_scores_over_seeds_have_a_row_per_inner_step():
    found = {"exact": SeedScore((0, 1), np.array([0.2, 0.805]), np.array([0.01, 0.02]), 1)}
    lines = _shown(tables.seeds_table(PRESET, found, 600), width=140)
    assert "test accuracy, %, mean ± standard deviation over 2 seeds, each on 600 tasks" in lines[0]
    assert lines[-1].split() == ["1", "(headline)", "80.5", "±", "2.0"]


def test_some_rows_of_the_gradients_are_shown():
    steps = list(range(0, 600, 50))
    gradient = {"step": steps, "cosine": [0.5] * 12, "norm_ratio": [2.0] * 12}
    lines = _shown(tables.gradient_table(gradient, "exact"))
    shown = [line.split() for line in lines if line.split()[0].isdigit()]
    assert len(shown) == tables.MAX_ROWS
    assert (shown[0], shown[-1]) == (["0", "0.500", "2"], ["550", "0.500", "2"])


def test_every_preset_is_listed_in_80_columns():
    lines = _shown(tables.presets_table(presets.PRESETS.values()))
    assert max(map(len, lines)) <= 80
    listed = [line.split()[0] for line in lines]
    assert [name for name in listed if name in presets.PRESETS] == list(presets.PRESETS)
    text = " ".join(" ".join(lines).split())
    for preset in presets.PRESETS.values():
        assert preset.paper in text


def test_a_source_is_stated_once():
    preset = presets.get("glyphs-5w1s")
    other = dataclasses.replace(preset, name="other", table="table 9")
    text = "\n".join(_shown(tables.presets_table([preset, preset, other])))
    assert text.count(f"{preset.paper}, {preset.table}") == 1
    assert text.count(f"{preset.paper}, table 9") == 1


def test_many_scores_have_a_row_each():
    """Twenty columns would be too narrow to read."""
    reference = named("classification", 0.31)
    score = Score(np.array([0.2, 0.4, 0.853]), np.full(3, 0.012), 1, 2)
    scores = {f"exact, seed {i}": score for i in range(tables.MAX_COLUMNS + 1)}
    rows = [
        " ".join(line.split())
        for line in _shown(tables.scores_table(PRESET, scores, 600, reference))
    ]
    assert "exact, seed 4 20.0 ± 1.2 40.0 ± 1.2 2 85.3 ± 1.2 1" in rows
    assert "NN, pixels 31.0" in rows
    over = {f"learner {i}": SeedScore((0, 1), score.mean, score.ci95, 2) for i in range(5)}
    rows = [
        " ".join(line.split()) for line in _shown(tables.seeds_table(PRESET, over, 600), width=110)
    ]
    assert "learner 4 20.0 ± 1.2 40.0 ± 1.2 2 85.3 ± 1.2" in rows


def test_brackets_in_names_and_paths_are_not_markup():
    path = pathlib.Path("/data/x[/y]/omniglot/3.0.0")
    found = [
        Prepared("omniglot", path, 2, 9, ("[b]old[/i]", 4)),
        Prepared("cifar100", path, problem="no [/dim] here"),
    ]
    shown = "\n".join(_shown(tables.datasets_table(found, "/data/x[/y]"), width=120))
    for text in ("prepared in /data/x[/y]", "[b]old[/i], 4", "no [/dim] here"):
        assert text in shown


def test_what_trpo_counts_is_called_a_lower_bound():
    trpo = dataclasses.replace(presets.get("nav2d"), outer="trpo")
    assert tables.gflop(presets.get("nav2d"), 2e9) == "2"
    assert tables.gflop(trpo, 2e9) == "at least 2"
