"""The tables that the commands print."""

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxmaml.data.preparation import Prepared
from jaxmaml.diagnostics import CgResidual
from jaxmaml.experiments import settings
from jaxmaml.experiments.presets import Preset, title
from jaxmaml.experiments.references import Reference
from jaxmaml.experiments.run import Run
from jaxmaml.experiments.run_dir import Gradient
from jaxmaml.experiments.scoring import Score, averaged_suffix, score_text, value_text
from jaxmaml.experiments.seeds import SeedScore, as_scores

MAX_ROWS = 7
"""Rows of the gradient table."""
MAX_COLUMNS = 4
"""Up to this number of runs, each has a column; more of them have a row each."""
SUMMARY = ("0 steps", "1 step", "inner\nsteps", "score")
"""The columns of a row with the most important scores of a run."""


def console() -> Console:
    """Returns standard output, wide enough for a table if nothing says how wide it is."""
    is_known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console() if is_known else Console(width=120)


def rounded(value: float) -> str:
    """Returns a number with three digits; a large one as a whole number, without an exponent.

    >>> rounded(0.01234), rounded(1070.4)
    ('0.0123', '1,070')
    """
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def scores_table(
    preset: Preset, scores: Mapping[str, Score], num_test_tasks: int, reference: Reference | None
) -> Table:
    """Returns a table with one row per inner step or, for many runs, one per run.

    Args:
        preset: the settings.
        scores: the score of each run on the test tasks, by label.
        num_test_tasks: the number of test tasks.
        reference: what the scores are compared with; None for no such row.
    """
    table = _titled(_title(preset, num_test_tasks))
    if len(scores) > MAX_COLUMNS:
        _add_runs(table, preset, scores)
        _add_reference(table, preset, reference)
        return table
    _add_inner_steps(table, preset, scores)

    # What to compare the scores with, and what is wrong with them.
    if reference is not None:
        cells = [preset.metric.text(reference.value)] * len(scores)
        table.add_row(reference.name, *cells, style="dim")
    if any(score.num_nonfinite for score in scores.values()):
        counts = [str(score.num_nonfinite) for score in scores.values()]
        table.add_row("tasks not finite", *counts, style="red")
    return table


def summary_table(
    preset: Preset, runs: Iterable[Run], num_test_tasks: int, reference: Reference | None
) -> Table:
    """Returns a table with one row per run: its headline score and its costs.

    "NN" is the nearest neighbor, on the features of the unadapted network or on pixels.

    Args:
        preset: the settings.
        runs: the runs, in the order of the rows.
        num_test_tasks: the number of test tasks.
        reference: what the scores are compared with; None for no such row.
    """
    # Columns.
    table = _titled(_title(preset, num_test_tasks))
    table.add_column("learner")
    for name in (*SUMMARY, "NN,\nfeatures", "ms/step", "MiB", "GFLOP/step"):
        table.add_column(name, justify="right")

    # Rows.
    for run in runs:
        memory = "unknown" if run.temp_bytes is None else rounded(run.temp_bytes / 2**20)
        costs = [rounded(1e3 * run.seconds_per_outer_step), memory, gflop(preset, run.flops)]
        table.add_row(run.label, *_summary(preset, run.test), _on_features(run), *costs)
        if run.averaged is not None:
            label = run.label + averaged_suffix(len(run.averaged_states))
            table.add_row(label, *_summary(preset, run.averaged))
    _add_reference(table, preset, reference)
    return table


def seeds_table(preset: Preset, found: Mapping[str, SeedScore], num_test_tasks: int) -> Table:
    """Returns a table of means and standard deviations over seeds, in the form of `scores_table`.

    Args:
        preset: the settings.
        found: the scores over seeds, by the name of the learner.
        num_test_tasks: the number of test tasks of each run.
    """
    number, scores = len(next(iter(found.values())).seeds), as_scores(found)
    table = _titled(
        f"{title(preset)}: test {_metric(preset)}, mean ± standard deviation over {number} seeds, "
        f"each on {num_test_tasks} tasks"
    )
    (_add_runs if len(scores) > MAX_COLUMNS else _add_inner_steps)(table, preset, scores)
    return table


def add_features(table: Table, runs: Iterable[Run]) -> None:
    """Appends the nearest neighbor on the features of each run, if there are any."""
    found = [_on_features(run) for run in runs]
    if any(found):
        table.add_row("nearest neighbor, features", *found, style="dim")


def add_costs(table: Table, preset: Preset, runs: Iterable[Run]) -> None:
    """Appends the costs of the runs, one row per quantity."""
    runs = list(runs)
    table.add_section()
    ends = [" (patience)" if run.stopped_early else "" for run in runs]
    done = [f"{run.num_outer_steps:,}{end}" for run, end in zip(runs, ends, strict=True)]
    table.add_row("outer steps", *done)
    if any(run.num_skipped for run in runs):
        table.add_row(
            "left out, not finite", *[f"{run.num_skipped:,}" for run in runs], style="red"
        )
    if any(run.num_rejected for run in runs):
        table.add_row("without an accepted step", *[f"{run.num_rejected:,}" for run in runs])
    selected = [int(run.meta_state.step) for run in runs]
    if selected != [run.num_outer_steps for run in runs]:
        table.add_row("selected by validation", *[f"{step:,}" for step in selected])
    table.add_row("ms per outer step", *[rounded(1e3 * run.seconds_per_outer_step) for run in runs])
    table.add_row("s to compile", *[f"{run.compile_seconds:.1f}" for run in runs])
    table.add_row("XLA temporary memory", *[_mebibytes(run.temp_bytes) for run in runs])
    table.add_row("GFLOP per outer step", *[gflop(preset, run.flops) for run in runs])


def gflop(preset: Preset, flops: float) -> str:
    """Returns the operations of an outer step as text. The loops of TRPO are counted once."""
    return "at least " * (preset.outer == "trpo") + rounded(flops / 1e9)


def gradient_table(gradient: Gradient, label: str) -> Table:
    """Returns a table of first-order against exact meta-gradients at some outer steps of a run."""
    table = _titled(f"first-order against exact meta-gradient, along {label}")
    for name in ("outer step", "cosine", "norm, first / exact"):
        table.add_column(name, justify="right")
    count = len(gradient["step"])
    for i in np.unique(np.linspace(0, count - 1, min(count, MAX_ROWS)).round().astype(int)):
        cosine, ratio = gradient["cosine"][i], gradient["norm_ratio"][i]
        table.add_row(f"{gradient['step'][i]:,}", f"{cosine:.3f}", rounded(ratio))
    return table


def residual_line(label: str, residuals: CgResidual) -> str:
    """Returns the result of `probes.cg_residuals` in words."""
    return (
        f"{label}: conjugate gradients leave {residuals.solver:.2g} of the right-hand side "
        f"({residuals.undamped:.2g} of the system without damping), the inner loop "
        f"{residuals.minimum:.2g} of its first gradient (means over test tasks; 0 is a solution)"
    )


def best_line(preset: Preset, runs: Iterable[Run]) -> str:
    """Returns the test score of each learner at the inner rate that the last validation prefers.

    With several seeds, the means over seeds are compared and shown, with the standard deviation.
    """
    # The runs at one rate, and the names of each learner's rates.
    runs = list(runs)
    at_rate: dict[str, list[Run]] = {}
    rates: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        spec = run.candidate.spec
        at_rate.setdefault(spec.group, []).append(run)
        rates.setdefault((spec.learner, spec.order), []).append(spec.group)

    # The best one of each learner.
    merit = lambda name: float(np.mean([_merit(preset, run) for run in at_rate[name]]))
    best = [max(names, key=merit) for names in rates.values()]
    found = [f"{name} {_over_seeds_text(preset, at_rate[name])}" for name in best]
    chosen_on = "validation" if all(run.curve for run in runs) else "test"
    return f"each at its best rate (chosen on {chosen_on} tasks): {', '.join(found)}"


def presets_table(presets: Iterable[Preset]) -> Table:
    """Returns a table of presets: expected scores of MAML, costs, and sources as footnotes."""
    # Number the sources in the order of their appearance.
    presets = list(presets)
    sources = list(dict.fromkeys(f"{preset.paper}, {preset.table}" for preset in presets))
    notes = "\n".join(f"({number}) {source}" for number, source in enumerate(sources, start=1))

    # One row per preset.
    table = Table(box=box.SIMPLE_HEAD, caption=notes, caption_justify="left")
    table.add_column("preset", no_wrap=True)
    table.add_column("expected of MAML")
    table.add_column("outer\nsteps", justify="right")
    table.add_column("time on 2\nCPU cores")
    table.add_column("source")
    for preset in presets:
        number = 1 + sources.index(f"{preset.paper}, {preset.table}")
        steps = f"{preset.num_outer_steps:,}"
        table.add_row(preset.name, preset.expected, steps, preset.cost, f"({number})")
    return table


def settings_table(preset: Preset) -> Table:
    """Returns a table of the settings of a preset that have an effect, in their groups.

    Below it are the number that it should reproduce, the source, and the time that it takes.
    """
    facts = f"expected of MAML: {preset.expected} ({preset.paper}, {preset.table})"
    notes = f"{facts}\ntime on 2 CPU cores: {preset.cost}\ninner rates belong to a mean loss"
    table = Table(
        box=box.SIMPLE_HEAD,
        title=escape(title(preset)),
        caption=escape(notes),
        caption_justify="left",
    )
    for name in ("group", "setting", "value"):
        table.add_column(name)
    before = ""
    for name, field in settings.options().items():
        if settings.why_unused(preset, name):
            continue
        group, value = field.metadata["group"], getattr(preset, name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        option = "--" + name.replace("_", "-")
        table.add_row("" if group == before else group, option, shown or "-")
        before = group
    return table


def facts_table(rows: Mapping[str, str]) -> Table:
    """Returns a table of facts, each with its name."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for fact, value in rows.items():
        table.add_row(f"  {escape(fact)}", escape(value))
    return table


def datasets_table(found: Iterable[Prepared], directory: str) -> Table:
    """Returns a table of the datasets of a directory, with the problems of those that are broken."""
    table = _titled(f"prepared in {directory}")
    for name in ("dataset", "version"):
        table.add_column(name)
    for name in ("classes", "images"):
        table.add_column(name, justify="right")
    table.add_column("smallest class")
    for one in found:
        if one.problem:
            table.add_row(one.name, one.directory.name, "-", "-", escape(one.problem), style="red")
            continue
        name, count = one.smallest
        numbers = f"{one.num_classes:,}", f"{one.num_images:,}"
        table.add_row(one.name, one.directory.name, *numbers, escape(f"{name}, {count}"))
    return table


def _over_seeds_text(preset: Preset, runs: list[Run]) -> str:
    """Returns the test score of a run, or the mean and standard deviation of several ones, as text."""
    step = runs[0].test.headline
    if len(runs) == 1:
        return score_text(preset, runs[0].test, step)
    means = [run.test.mean[step] for run in runs]
    return value_text(preset, float(np.mean(means)), float(np.std(means, ddof=1)))


def _title(preset: Preset, num_test_tasks: int) -> str:
    return f"{title(preset)}: test {_metric(preset)}, 95 % CI over {num_test_tasks} tasks"


def _metric(preset: Preset) -> str:
    return ", ".join(filter(None, (preset.metric.name, preset.metric.unit)))


def _add_inner_steps(table: Table, preset: Preset, scores: Mapping[str, Score]) -> None:
    """Fills a table with one column per run and one row per inner step; the headline is marked."""
    table.add_column("inner steps")
    for label in scores:
        table.add_column(label, justify="right")
    headlines = {score.headline for score in scores.values()}
    for i in range(max(len(score.mean) for score in scores.values())):
        cells = [_cell(preset, score, i, mark=len(headlines) > 1) for score in scores.values()]
        quoted = headlines == {i}
        table.add_row(f"{i} (headline)" if quoted else f"{i}", *cells, style="bold" * quoted)


def _add_runs(table: Table, preset: Preset, scores: Mapping[str, Score]) -> None:
    """Fills a table with one row per run, of its most important scores."""
    table.add_column("run")
    are_finite = not any(score.num_nonfinite for score in scores.values())
    for name in (*SUMMARY, *(() if are_finite else ("tasks not\nfinite",))):
        table.add_column(name, justify="right")
    for label, score in scores.items():
        counts = () if are_finite else (f"{score.num_nonfinite}",)
        table.add_row(label, *_summary(preset, score), *counts)


def _add_reference(table: Table, preset: Preset, reference: Reference | None) -> None:
    """Appends what the scores are compared with to a table of one row per run."""
    if reference is not None:
        value = preset.metric.text(reference.value)
        table.add_row(reference.short, "", "", "", value, style="dim")


def _summary(preset: Preset, score: Score) -> list[str]:
    """Returns the cells of `SUMMARY`."""
    early = [_cell(preset, score, i, mark=False) for i in (0, 1)]
    return [*early, f"{score.headline}", score_text(preset, score, score.headline)]


def _cell(preset: Preset, score: Score, step: int, *, mark: bool) -> str:
    if step >= len(score.mean):
        return ""
    text = score_text(preset, score, step)
    return f"[bold]{text}[/bold]" if mark and step == score.headline else text


def _merit(preset: Preset, run: Run) -> float:
    """Returns a number that is higher for a better run; minus infinity for one that failed."""
    score = run.curve[-1][1] if run.curve else run.test
    mean: Any = score.mean[score.headline]
    if not np.isfinite(mean) or run.stopped:
        return -np.inf
    return mean if preset.metric.higher_is_better else -mean


def _titled(title: str) -> Table:
    """Returns a table that is as wide as its title: rich would break a longer title."""
    return Table(title=escape(title), box=box.SIMPLE_HEAD, min_width=len(title) + 4)


def _mebibytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{rounded(num_bytes / 2**20)} MiB"


def _on_features(run: Run) -> str:
    return "" if run.on_features is None else f"{100 * run.on_features:.1f}"
