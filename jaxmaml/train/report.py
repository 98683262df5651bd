"""The tables that a command prints."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from jaxmaml.data.preparation import Prepared
from jaxmaml.train.presets import Preset
from jaxmaml.train.results import Gradient
from jaxmaml.train.scoring import Score
from jaxmaml.train.training import Run

MAX_ROWS = 7
MAX_COLUMNS = 4
"""Runs that have a column each; more of them have a row each."""


def console() -> Console:
    """Standard output; wide enough for a table where it is no terminal."""
    out = Console()
    return out if out.is_terminal else Console(width=120)


def scores_table(
    preset: Preset, scores: Mapping[str, Score], num_test_tasks: int, floor: float | None
) -> Table:
    """One row per inner step, one column per run; what is quoted is marked.

    Args:
        preset: what was run.
        scores: label -> score on the test tasks.
        num_test_tasks: how many.
        floor: nearest neighbour's accuracy.
    """
    metric = "MSE" if preset.is_regression else "accuracy, %"
    table = _titled(f"{preset.name}: test {metric}, 95 % CI over {num_test_tasks} tasks")
    table.add_column("inner steps")
    for label in scores:
        table.add_column(label, justify="right")
    headlines = {score.headline for score in scores.values()}
    for i in range(max(len(score.mean) for score in scores.values())):
        cells = [_cell(preset, score, i, mark=len(headlines) > 1) for score in scores.values()]
        quoted = headlines == {i}
        table.add_row(f"{i} (headline)" if quoted else f"{i}", *cells, style="bold" * quoted)
    if floor is not None:
        table.add_row(
            "nearest neighbour, pixels", *[f"{100 * floor:.1f}"] * len(scores), style="dim"
        )
    if any(score.num_nonfinite for score in scores.values()):
        counts = [str(score.num_nonfinite) for score in scores.values()]
        table.add_row("tasks not finite", *counts, style="red")
    return table


def summary_table(
    preset: Preset, runs: list[Run], num_test_tasks: int, floor: float | None
) -> Table:
    """One row per run, for a comparison of many: the score that is quoted, and the costs.

    "NN" is nearest neighbour: on the features before they are adapted, on pixels.

    Args:
        preset: what was run.
        runs: in the order of the rows.
        num_test_tasks: how many tasks were scored.
        floor: nearest neighbour's accuracy.
    """
    metric = "MSE" if preset.is_regression else "accuracy, %"
    table = _titled(f"{preset.name}: test {metric}, 95 % CI over {num_test_tasks} tasks")
    table.add_column("learner")
    names = ("0 steps", "1 step", "inner steps", "score", "NN, features")
    for name in (*names, "ms/step", "MiB", "GFLOP/step"):
        table.add_column(name, justify="right")
    for run in runs:
        score = run.test
        early = [_cell(preset, score, i, mark=False) for i in (0, 1)]
        quoted = value(preset, score, score.headline)
        memory = "unknown" if run.temp_bytes is None else f"{run.temp_bytes / 2**20:.3g}"
        costs = [f"{1e3 * run.seconds_per_outer_step:.3g}", memory, f"{run.flops / 1e9:.3g}"]
        cells = (*early, f"{score.headline}", quoted, _on_features(run), *costs)
        table.add_row(run.spec.label, *cells)
    if floor is not None:
        table.add_row("NN, pixels", "", "", "", f"{100 * floor:.1f}", style="dim")
    return table


def add_features(table: Table, runs: Iterable[Run]) -> None:
    """Append nearest neighbour on each run's features, where there are such."""
    found = [_on_features(run) for run in runs]
    if any(found):
        table.add_row("nearest neighbour, features", *found, style="dim")


def add_costs(table: Table, runs: Iterable[Run]) -> None:
    """Append what the runs cost, one row per quantity."""
    runs = list(runs)
    table.add_section()
    table.add_row("outer steps", *[f"{run.num_outer_steps:,}" for run in runs])
    selected = [int(run.meta_state.step) for run in runs]
    if selected != [run.num_outer_steps for run in runs]:
        table.add_row("selected by validation", *[f"{step:,}" for step in selected])
    table.add_row("ms per outer step", *[f"{1e3 * run.seconds_per_outer_step:.3g}" for run in runs])
    table.add_row("s to compile", *[f"{run.compile_seconds:.1f}" for run in runs])
    table.add_row("XLA temporary memory", *[_mebibytes(run.temp_bytes) for run in runs])
    table.add_row("GFLOP per outer step", *[f"{run.flops / 1e9:.3g}" for run in runs])


def gradient_table(gradient: Gradient, label: str) -> Table:
    """First-order against exact meta-gradient at some outer steps of the exact run."""
    table = _titled(f"first-order against exact meta-gradient, along {label}")
    for name in ("outer step", "cosine", "norm, first / exact"):
        table.add_column(name, justify="right")
    count = len(gradient["step"])
    for i in np.unique(np.linspace(0, count - 1, min(count, MAX_ROWS)).round().astype(int)):
        cosine, ratio = gradient["cosine"][i], gradient["norm_ratio"][i]
        table.add_row(f"{gradient['step'][i]:,}", f"{cosine:.3f}", f"{ratio:.3g}")
    return table


def residual_line(label: str, residuals: tuple[float, float]) -> str:
    """What `scoring.cg_residuals` found, in words."""
    solved, minimum = residuals
    return (
        f"{label}: conjugate gradients leave {solved:.2g} of the right-hand side, the inner loop "
        f"{minimum:.2g} of its first gradient (means over test tasks; 0 is a solution)"
    )


def best_line(preset: Preset, runs: list[Run]) -> str:
    """Each learner at the inner rate that the last validation prefers, with its test score."""
    found = []
    kind = lambda run: (run.spec.learner, run.spec.order)
    for wanted in dict.fromkeys(map(kind, runs)):
        best = max((run for run in runs if kind(run) == wanted), key=lambda r: _merit(preset, r))
        found.append(f"{best.spec.label} {value(preset, best.test, best.test.headline)}")
    chosen_on = "validation" if all(run.curve for run in runs) else "test"
    return f"each at its best rate (chosen on {chosen_on} tasks): {', '.join(found)}"


def presets_table(presets: Iterable[Preset]) -> Table:
    """What there is, what it should give, and what it costs."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("preset", "expected of MAML", "outer steps", "2 CPU cores", "source"):
        table.add_column(name)
    for preset in presets:
        table.add_row(
            preset.name,
            preset.expected,
            f"{preset.num_outer_steps:,}",
            preset.cost,
            f"{preset.paper}, {preset.table}",
        )
    return table


def datasets_table(found: Iterable[Prepared], directory: str) -> Table:
    """The data sets of a directory, and what is wrong with those that cannot be read."""
    table = _titled(f"prepared in {directory}")
    for name in ("data set", "version"):
        table.add_column(name)
    for name in ("classes", "images"):
        table.add_column(name, justify="right")
    table.add_column("smallest class")
    for one in found:
        if one.problem:
            table.add_row(one.name, one.directory.name, "-", "-", one.problem, style="red")
            continue
        name, count = one.smallest
        numbers = f"{one.num_classes:,}", f"{one.num_images:,}"
        table.add_row(one.name, one.directory.name, *numbers, f"{name}, {count}")
    return table


def value(preset: Preset, score: Score, step: int) -> str:
    """A score after `step` inner steps as text: percent, or a mean squared error."""
    mean, ci95 = score.mean[step], score.ci95[step]
    if not np.isfinite(mean):
        return "not finite"
    if preset.is_regression:
        return f"{mean:.3f} ± {ci95:.3f}"
    return f"{100 * mean:.1f} ± {100 * ci95:.1f}"


def _cell(preset: Preset, score: Score, step: int, *, mark: bool) -> str:
    if step >= len(score.mean):
        return ""
    text = value(preset, score, step)
    return f"[bold]{text}[/bold]" if mark and step == score.headline else text


def _merit(preset: Preset, run: Run) -> float:
    score = run.curve[-1][1] if run.curve else run.test
    mean: Any = score.mean[score.headline]
    if not np.isfinite(mean) or run.stopped:
        return -np.inf
    return -mean if preset.is_regression else mean


def _titled(title: str) -> Table:
    """Rich would break a title that is longer than the table is wide."""
    return Table(title=title, box=box.SIMPLE_HEAD, min_width=len(title) + 4)


def _mebibytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 2**20:.3g} MiB"


def _on_features(run: Run) -> str:
    return "" if run.on_features is None else f"{100 * run.on_features:.1f}"
