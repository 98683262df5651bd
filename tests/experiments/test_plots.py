"""Plots show the numbers that they are given, keep gaps, and are written whole or not at all."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from jaxmaml.experiments import plots

STEP = [0, 100, 200, 300]
CURVES = {
    "exact": {"step": STEP, "value": [1.6, 1.0, None, 0.4], "ci95": [0.1, 0.1, None, 0.1]},
    "first": {"step": STEP, "value": [1.6, 1.2, 0.9, 0.7]},
}
RUNS = {
    "exact": {"mean": [0.2, 0.84, 0.86, 0.866], "ci95": [0.01, 0.02, 0.02, 0.006]},
    "first": {"mean": [0.2, 0.70, None, None], "ci95": [0.01, 0.02, None, None]},
}


def _legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def _lines(figure: Figure) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.array(line.get_ydata()) for line in figure.axes[0].lines}


def _regression() -> Figure:
    x = np.linspace(-5, 5, 50)[:, None]
    curves = {"truth": np.sin(x), "before": 0 * x, "after 1 step": 0.5 * np.sin(x)}
    return plots.regression(x, curves, x[:25:5], np.sin(x[:25:5]))


def test_learning_curves_draw_the_values_and_leave_gaps() -> None:
    figure = plots.learning_curves(CURVES, ylabel="query loss")
    lines = _lines(figure)
    np.testing.assert_array_equal(lines["exact"], [1.6, 1.0, np.nan, 0.4])
    np.testing.assert_array_equal(lines["first"], [1.6, 1.2, 0.9, 0.7])
    # Only the run that has an interval gets a band.
    assert len(figure.axes[0].collections) == 1
    assert _legend(figure) == ["exact", "first"]


def test_a_value_between_two_gaps_is_visible() -> None:
    curve = {"step": [0, 1, 2], "value": [None, 0.5, None]}
    (line,) = plots.learning_curves({"exact": curve}, ylabel="loss").axes[0].lines
    assert line.get_marker() not in ("", "None", None)


def test_metric_per_step_shows_means_intervals_reference_and_headline() -> None:
    figure = plots.metric_per_step(
        RUNS, ylabel="accuracy", reference=("nearest neighbor", 0.41), headline=3
    )
    exact, first = figure.axes[0].containers
    np.testing.assert_array_equal(exact[0].get_ydata(), RUNS["exact"]["mean"])
    np.testing.assert_array_equal(first[0].get_ydata(), [0.2, 0.7, np.nan, np.nan])
    bars = np.array([segment[:, 1] for segment in exact[2][0].get_segments()])
    np.testing.assert_allclose((bars[:, 1] - bars[:, 0]) / 2, RUNS["exact"]["ci95"])
    assert set(_legend(figure)) == {
        "exact: 0.866 ± 0.006",
        "first: not finite",
        "nearest neighbor: 0.410",
        "headline: 3 inner steps",
    }


def test_a_run_without_the_headline_step_is_quoted_without_a_number() -> None:
    runs = {"exact": {"mean": [0.2, 0.8], "ci95": [0.01, 0.01]}}
    assert "exact" in _legend(plots.metric_per_step(runs, ylabel="accuracy", headline=3))


def test_inner_steps_have_integer_ticks() -> None:
    ticks = plots.metric_per_step(RUNS, ylabel="accuracy").axes[0].get_xticks()
    np.testing.assert_array_equal(ticks, np.round(ticks))
    assert {0, 1, 2, 3} <= set(ticks)


def test_a_diverged_run_gets_a_logarithmic_axis() -> None:
    tame = {"exact": {"mean": [4.4, 0.6], "ci95": [0.1, 0.1]}}
    wild = {**tame, "first": {"mean": [4.4, 7e13], "ci95": [0.1, 7e13]}}
    assert plots.metric_per_step(tame, ylabel="MSE").axes[0].get_yscale() == "linear"
    assert plots.metric_per_step(wild, ylabel="MSE").axes[0].get_yscale() == "log"


def test_a_learner_keeps_its_color_and_a_rate_its_line() -> None:
    labels = ["first@0.4", "exact@0.1", "exact@0.4", "reptile@0.4"]
    curve = {"step": [0, 1], "value": [1.0, 0.5]}
    figure = plots.learning_curves(dict.fromkeys(labels, curve), ylabel="loss")
    line = {str(line.get_label()): line for line in figure.axes[0].lines}
    alone = plots.learning_curves({"exact": curve}, ylabel="loss").axes[0].lines[0]
    assert line["exact@0.1"].get_color() == line["exact@0.4"].get_color() == alone.get_color()
    assert len({line[label].get_color() for label in labels}) == 3
    assert line["exact@0.4"].get_linestyle() == line["first@0.4"].get_linestyle()
    assert line["exact@0.4"].get_linestyle() != line["exact@0.1"].get_linestyle()


def test_gradient_agreement_draws_both_numbers_with_gaps() -> None:
    figure = plots.gradient_agreement([0, 50, 100], [0.9, None, 0.7], [1.1, 1.5, 1.9])
    for axes, values in zip(figure.axes, ([0.9, np.nan, 0.7], [1.1, 1.5, 1.9]), strict=True):
        np.testing.assert_array_equal(np.array(axes.lines[1].get_ydata()), values)


def test_gradient_agreement_draws_a_line_for_each_layer() -> None:
    layers = {"conv/0": {"cosine": [0.5, 0.4], "norm_ratio": [3.0, 4.0]}}
    figure = plots.gradient_agreement([0, 50], [0.9, 0.7], [1.1, 1.5], layers=layers)
    lines = _lines(figure)
    np.testing.assert_array_equal(lines["conv/0"], [0.5, 0.4])
    np.testing.assert_array_equal(lines["whole gradient"], [0.9, 0.7])
    np.testing.assert_array_equal(figure.axes[1].lines[1].get_ydata(), [3.0, 4.0])
    assert _legend(figure) == ["both gradients equal", "conv/0", "whole gradient"]


def test_regression_draws_every_curve_and_the_support() -> None:
    figure = _regression()
    x = np.linspace(-5, 5, 50)
    lines = _lines(figure)
    assert list(lines) == ["truth", "before", "after 1 step", "support"]
    np.testing.assert_allclose(lines["after 1 step"], 0.5 * np.sin(x))
    np.testing.assert_allclose(lines["support"], np.sin(x[:25:5]))


@pytest.mark.parametrize("channels", [1, 3])
def test_episode_places_each_image_and_frames_predictions(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 8, channels))
    predictions = np.array([[0, 0, 0, 0], [1, 2, 1, 1], [0, 2, 2, 2]])
    figure = plots.episode(images[:, :2], images[:, 2:], predictions)
    (axes,) = figure.axes
    assert len(axes.images) == 18
    shown = np.array(axes.images[1].get_array())
    expected = images[0, 1] / 255
    np.testing.assert_allclose(shown, expected if channels == 3 else 1 - expected.repeat(3, -1))
    edges = [to_hex(patch.get_edgecolor()) for patch in axes.patches]
    assert edges.count(plots.RIGHT_COLOR.lower()) == 10
    assert edges.count(plots.WRONG_COLOR.lower()) == 2
    wrong = [text.get_text() for text in axes.texts if text.get_bbox_patch()]
    assert wrong == ["2", "0"]
    assert figure.get_suptitle() == "3-way 2-shot episode: 10 of 12 query images right"


def test_episode_frames_the_image_that_was_mistaken() -> None:
    images = np.zeros((2, 4, 8, 8, 1))
    figure = plots.episode(images[:, :1], images[:, 1:], np.array([[0, 0, 0], [1, 0, 1]]))
    (axes,) = figure.axes
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    (red,) = [f for f in frames if to_hex(f.get_edgecolor()) == plots.WRONG_COLOR.lower()]
    # Row 1, third column: the support image, then the query images 0 and 1.
    left, right, bottom, top = axes.images[4 + 2].get_extent()
    assert red.get_bbox().extents == pytest.approx((left, top, right, bottom))


def test_normalized_float_images_are_stretched_into_range() -> None:
    images = np.linspace(-2.0, 2.0, 2 * 3 * 8 * 8 * 3).reshape(2, 3, 8, 8, 3)
    shown = plots.episode(images[:, :1], images[:, 1:]).axes[0].images
    values = np.concatenate([np.ravel(np.asarray(image.get_array())) for image in shown])
    assert (values.min(), values.max()) == pytest.approx((0.0, 1.0))


def _episode(way: int, shot: int, query: int) -> Figure:
    predictions = np.zeros((way, query), int)
    return plots.episode(np.ones((way, shot, 8, 8, 1)), np.ones((way, query, 8, 8, 1)), predictions)


FIGURES = {
    "curves": lambda: plots.learning_curves(
        CURVES, ylabel="validation mean squared error after 10 inner steps"
    ),
    "six runs": lambda: plots.metric_per_step(
        {f"{order}@{rate}": run for order, run in RUNS.items() for rate in (0.1, 0.4, 2.0)},
        ylabel="accuracy",
        reference=("nearest neighbor", 0.41),
        headline=3,
    ),
    "gradients": lambda: plots.gradient_agreement(STEP, [1, 0.9, 0.8, 0.7], [1, 1.2, 1.4, 1.6]),
    "regression": _regression,
    "5w1s": lambda: _episode(5, 1, 1),
    "5w5s": lambda: _episode(5, 5, 15),
    "20w1s": lambda: _episode(20, 1, 15),
}


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_lies_outside_or_over_the_data(name: str) -> None:
    figure = FIGURES[name]()
    figure.canvas.draw()
    texts = [*figure.legends, *(text for axes in figure.axes for text in axes.texts)]
    labels = [axes.yaxis.label for axes in figure.axes if axes.axison]
    boxes = [artist.get_window_extent() for artist in (*texts, *labels)]
    page = figure.bbox
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes)
    assert all(page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    # A long label would run into the title.
    assert all(label.get_window_extent().y1 <= page.y1 - 25 for label in labels)
    for legend in figure.legends:
        assert not any(legend.get_window_extent().overlaps(axes.bbox) for axes in figure.axes)


def test_save_writes_a_readable_image_and_nothing_else(tmp_path) -> None:
    plots.save(plots.learning_curves(CURVES, ylabel="query loss"), tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (960, 630)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch) -> None:
    def interrupted(self: Figure, target: io.BytesIO, **_: object) -> None:
        target.write(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plots.save(plots.learning_curves(CURVES, ylabel="query loss"), tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_overwrites_no_file(tmp_path) -> None:
    path = tmp_path / "plot.png"
    path.write_bytes(b"my picture")
    with pytest.raises(ValueError, match=r"plot\.png exists already"):
        plots.save(plots.learning_curves(CURVES, ylabel="query loss"), path)
    assert path.read_bytes() == b"my picture"


def test_bad_input_is_named() -> None:
    images = np.zeros((5, 2, 8, 8, 1))
    with pytest.raises(ValueError, match="curves is empty"):
        plots.learning_curves({}, ylabel="loss")
    with pytest.raises(ValueError, match="runs is empty"):
        plots.metric_per_step({}, ylabel="accuracy")
    with pytest.raises(ValueError, match=r"support_images must be .* got shape \(5, 2, 8, 8\)"):
        plots.episode(images[..., 0], images)
    with pytest.raises(ValueError, match="as many classes as support_images; got 4 and 5"):
        plots.episode(images, images[:4])
    with pytest.raises(ValueError, match=r"\[way, query\] = \(5, 2\); got \(5,\)"):
        plots.episode(images, images, np.zeros(5, int))


def test_more_learners_than_colors_can_be_told_apart() -> None:
    labels = [f"learner {i}" for i in range(17)]
    figure = plots.metric_per_step({n: {"mean": [0.2], "ci95": [0.1]} for n in labels}, ylabel="x")
    looks = {
        (line.get_color(), line.get_linestyle(), line.get_marker())
        for line, _, _ in figure.axes[0].containers
    }
    assert len(looks) == len(labels)
