"""The tables of a report."""

import dataclasses

import numpy as np

from experiments.tiny import PRESET, SPECS
from jaxmaml.experiments.report import contents, latex, pictures, saved_runs
from jaxmaml.experiments.report.blocks import Picture, Table
from jaxmaml.experiments.scoring import Score


def _run(name, mean=(0.2, 0.5), **changes):
    score = Score(np.array(mean), np.full(len(mean), 0.01), 0, len(mean) - 1)
    run = saved_runs.SavedRun(
        name=name, spec=SPECS[0], preset=PRESET, query_loss=np.array([1.0, 0.5]),
        validations=[(0, score)], test=score, num_test_tasks=5, results={"flops": 2e9},
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
    assert "&" in latex.table("x", runs)
    assert "nan" not in latex.table("x", runs)


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
    curve = pictures._loss_curve(losses)
    assert len(curve["step"]) <= pictures.MAX_POINTS
    assert (curve["step"][0], curve["value"][0]) == (600, losses[:600].mean())
    assert curve["step"][-1] == 60_000


def test_a_picture_says_what_it_shows():
    picture = pictures.scores([_run("a"), _run("b", mean=(0.2, 0.25))], None)
    assert isinstance(picture, Picture)
    assert "a 0.5, b 0.25" in picture.alt


def test_latex_has_no_more_columns_than_fit():
    runs = [_run("maml_plus_plus", mean=np.linspace(0.2, 0.9, 11))]
    text = latex.table("5 % & more", runs)
    assert r"maml\_plus\_plus & $20.0 \pm 1.0$" in text
    assert text.count("step") - text.count("steps,") <= latex.MAX_COLUMNS + 1
    assert "10 steps" in text
    assert r"5 \% \& more" in text
