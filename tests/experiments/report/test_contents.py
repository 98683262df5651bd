"""The tables of a report."""

import dataclasses

import numpy as np

from experiments.tiny import PRESET, SPECS
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.report import contents, latex, pictures, saved_runs
from jaxmaml.experiments.report.blocks import Listing, Picture, Table
from jaxmaml.experiments.scoring import Score


def _run(name, mean=(0.2, 0.5), **changes):
    score = Score(np.array(mean), np.full(len(mean), 0.01), 0, len(mean) - 1)
    run = saved_runs.SavedRun(
        name=name, spec=SPECS[0], preset=PRESET, seed=0, query_loss=np.array([1.0, 0.5]),
        skipped=np.zeros(2, bool), validations=[(0, score)], test=score, averaged=None,
        num_test_tasks=5, results={"flops": 2e9},
    )  # fmt: skip
    return run._replace(**changes)


def _directory(tmp_path, runs, name="a"):
    preset = dataclasses.asdict(runs[0].preset)
    config = {"preset": preset, "seed": 0, "class_split": None}
    results = {"floor": {"nearest_neighbour": 0.4}, "gradient": None}
    return saved_runs.SavedDirectory(tmp_path / name, name, config, results, runs)


def _tables(report):
    blocks = [block for part in report.parts for block in part.blocks]
    return {block.caption: block for block in blocks if isinstance(block, Table)}


def _latex(report):
    blocks = [block for part in report.parts for block in part.blocks]
    (text,) = (b.text for b in blocks if isinstance(b, Listing) and b.language == "latex")
    return text


def test_few_runs_have_a_column_and_many_a_row(tmp_path):
    for count in (2, contents.MAX_COLUMNS + 1):
        runs = [_run(f"run {i}") for i in range(count)]
        tables = _tables(contents.gather([_directory(tmp_path, runs)]))
        (table,) = (
            found for caption, found in tables.items() if caption.startswith("Test accuracy in")
        )
        shape = (len(table.rows), len(table.header))
        assert shape == ((2, count + 1) if count == 2 else (count, 3))
        assert "50.0 ± 1.0" in {cell for row in table.rows for cell in row}


def test_a_score_that_is_not_finite_is_not_a_number(tmp_path):
    score = Score(np.array([0.2, np.nan]), np.array([0.1, np.nan]), 3, 1)
    runs = [_run("a"), _run("b", test=score)]
    report = contents.gather([_directory(tmp_path, runs)])
    (table,) = (found for caption, found in _tables(report).items() if caption.startswith("Test"))
    assert [row[-1] for row in table.rows] == ["20.0 ± 10.0", "not finite", "3"]
    text = _latex(report)
    assert "&" in text
    assert "nan" not in text


def test_scores_of_different_tasks_are_not_in_one_table(tmp_path):
    other = dataclasses.replace(PRESET, way=2)
    report = contents.gather([
        _directory(tmp_path, [_run("a")]), _directory(tmp_path, [_run("b", preset=other)], "b")
    ])  # fmt: skip
    titles = [part.title for part in report.parts if part.title.startswith("Scores")]
    assert titles == [
        "Scores: glyphs (script), 3-way 2-shot",
        "Scores: glyphs (script), 2-way 2-shot",
    ]
    names = [picture.name for picture in report.pictures]
    assert len(set(names)) == len(names) == 6


def test_a_long_training_is_drawn_with_few_points():
    losses = np.arange(60_000.0)
    curve = pictures._loss_curve(_run("a", query_loss=losses, skipped=np.zeros(60_000, bool)))
    assert len(curve["step"]) <= pictures.MAX_POINTS
    assert (curve["step"][0], curve["value"][0]) == (600, losses[:600].mean())
    assert curve["step"][-1] == 60_000


def test_a_picture_says_what_it_shows():
    picture = pictures.scores([_run("a"), _run("b", mean=(0.2, 0.25))], None)
    assert isinstance(picture, Picture)
    assert "a 50, b 25" in picture.alt


def test_latex_has_no_more_columns_than_fit():
    score = Score(np.linspace(0.2, 0.9, 11), np.full(11, 0.01), 0, 10)
    text = latex.table("5 % & more", PRESET, {"maml_plus_plus": score}, "intervals")
    assert r"maml\_plus\_plus & $20.0 \pm 1.0$" in text
    assert text.count("step") - text.count("steps,") <= latex.MAX_COLUMNS + 1
    assert "10 steps" in text
    assert r"5 \% \& more" in text


def test_latex_has_the_headline_of_each_run():
    """With several headlines, the first inner steps leave room for all of them."""
    headlines = (5, 16, 20)
    scores = {
        f"{i} steps": Score(np.linspace(0.2, 0.9, i + 1), np.zeros(i + 1), 0, i) for i in headlines
    }
    head = latex.table("x", PRESET, scores, "intervals").split("toprule")[1].split("midrule")[0]
    assert [f"& {i} steps" in head for i in headlines] == [True] * 3


def test_skipped_steps_leave_no_gap_in_the_loss():
    losses, skipped = np.array([1.0, np.nan, 3.0]), np.array([False, True, False])
    run = _run("a", query_loss=np.tile(losses, 100), skipped=np.tile(skipped, 100))
    assert pictures._loss_curve(run)["value"] == [2.0] * 100
    only = _run("a", query_loss=losses, skipped=skipped)
    np.testing.assert_array_equal(pictures._loss_curve(only)["value"], losses)
    assert only.num_skipped == 1


SEEDS = [Spec(f"exact, seed {seed}", "exact", 0.1, seed=seed) for seed in (3, 4)]


def test_each_seed_has_its_own_and_their_mean_is_shown(tmp_path):
    runs = [
        _run(spec.label, mean=(0.2, mean), spec=spec, seed=spec.seed)
        for spec, mean in zip(SEEDS, (0.4, 0.6), strict=True)
    ]
    report = contents.gather([_directory(tmp_path, runs)])
    tables = _tables(report)
    assert [row[5] for row in tables["The runs of this report"].rows] == ["3", "4"]
    (over,) = (table for caption, table in tables.items() if "over seeds" in caption)
    assert list(over.header) == ["inner steps", "exact (2 seeds)"]
    assert over.rows[1][1] == "50.0 ± 14.1"
    text = _latex(report)
    assert r"exact (2 seeds) & $20.0 \pm 0.0$ & $50.0 \pm 14.1$" in text


def test_runs_that_differ_in_their_seed_only_differ(tmp_path):
    runs = [_run("a"), _run("b", seed=1)]
    for run in runs:
        assert run.spec.seed is None
    directories = [_directory(tmp_path, [run], run.name) for run in runs]
    assert _tables(contents.gather(directories))[
        "Settings that are not the same in all runs"
    ].rows == [("seed", "0", "1")]


def test_the_mean_of_predictions_is_a_score_of_its_own(tmp_path):
    mean = Score(np.array([0.3, 0.7]), np.array([0.01, 0.01]), 0, 1)
    run = _run("a", averaged=mean, results={"averaged": {"steps": [1, 2]}})
    report = contents.gather([_directory(tmp_path, [_run("b"), run])])
    (table,) = (table for caption, table in _tables(report).items() if caption.startswith("Test"))
    assert list(table.header) == ["inner steps", "b", "a", "a, mean of 2"]
    assert table.rows[1][1:] == ("50.0 ± 1.0", "50.0 ± 1.0", "70.0 ± 1.0")
    text = _latex(report)
    assert "a, mean of 2 & " in text


def test_the_end_of_a_run_is_named(tmp_path):
    results = {"num_outer_steps": 1, "num_skipped": 0, "selected_step": 1}
    ends = {
        "stopped early: outer step 1 of 2": {"stopped_early": True},
        "not finite: outer step 1 of 2": {"stopped": "outer step 1: loss is nan"},
        "finished: outer step 2 of 2": {"num_outer_steps": 2, "num_skipped": 1},
    }
    runs = [_run(f"run {i}", results=results | end) for i, end in enumerate(ends.values())]
    assert [run.status for run in runs] == list(ends)
    report = contents.gather([_directory(tmp_path, runs)])
    assert report.notice.endswith("last good state: run 1 (outer step 1: loss is nan).")
    costs = {row[0]: row[1:] for row in _tables(report)["Costs of the training"].rows}
    assert costs["left out, not finite"] == ("0", "0", "1")
    assert costs["selected by validation"] == ("1", "1", "1")
