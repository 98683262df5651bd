"""The contents of a report: its parts, as blocks that each renderer writes in its own language."""

import collections
import datetime
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jaxmaml
from jaxmaml.experiments import tables
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.report import configurations, latex, pictures
from jaxmaml.experiments.report.blocks import (
    Block,
    Listing,
    Paragraph,
    Part,
    Picture,
    Report,
    Table,
)
from jaxmaml.experiments.report.saved_runs import SavedDirectory, SavedRun

MAX_COLUMNS = tables.MAX_COLUMNS
"""Up to this number of runs, each has a column; more of them have a row each."""
NONE = "-"
"""A cell without a value."""

Runs: TypeAlias = list[SavedRun]


class Benchmark(NamedTuple):
    """Runs that are tested on the same kind of task, whose scores can therefore be compared.

    Attributes:
        title: the tasks in words.
        runs: the runs.
        directories: the directories of the runs.
    """

    title: str
    runs: Runs
    directories: list[SavedDirectory]


def gather(directories: Sequence[SavedDirectory]) -> Report:
    """Returns the report of some run directories."""
    benchmarks = _benchmarks(directories)
    titles = "; ".join(benchmark.title for benchmark in benchmarks)
    runs = [run for directory in directories for run in directory.runs]
    parts = [Part("Runs", [_runs_table(directories)])]
    for benchmark in benchmarks:
        suffix = f": {benchmark.title}" if len(benchmarks) > 1 else ""
        parts += [
            Part(part.title + suffix, part.blocks)
            for part in _parts_of_benchmark(benchmark)
            if part.blocks
        ]
    parts += [
        Part("Costs", [_costs(runs)]),
        Part("Differences of the configurations", [_differences(directories)]),
        Part("LaTeX", [_latex(benchmark) for benchmark in benchmarks]),
        Part("Full configurations", [configurations.listing(found) for found in directories]),
    ]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    footer = f"Written by jaxmaml {jaxmaml.__version__} on {now}."
    return Report(title=titles, notice=_notice(runs), parts=_named_apart(parts), footer=footer)


def _named_apart(parts: Sequence[Part]) -> list[Part]:
    """Returns the parts with a number after the names of pictures that several benchmarks have."""
    seen: collections.Counter[str] = collections.Counter()

    def apart(block: Block) -> Block:
        if not isinstance(block, Picture):
            return block
        seen[block.name] += 1
        number = seen[block.name]
        return block._replace(name=f"{block.name}-{number}") if number > 1 else block

    return [Part(part.title, [apart(block) for block in part.blocks]) for part in parts]


def _notice(runs: Runs) -> str:
    """Returns what a reader has to know first: which runs are unfinished; "" if none is."""
    unfinished = [f"{run.name} ({run.status})" for run in runs if run.test is None]
    return f"Unfinished runs, shown as far as they came: {', '.join(unfinished)}." * bool(
        unfinished
    )


def _benchmarks(directories: Sequence[SavedDirectory]) -> list[Benchmark]:
    """Returns the directories grouped by what their runs are tested on."""
    found: dict[str, list[SavedDirectory]] = {}
    for directory in directories:
        found.setdefault(_task_title(directory.runs[0].preset), []).append(directory)
    return [
        Benchmark(title, [run for directory in group for run in directory.runs], group)
        for title, group in found.items()
    ]


def _task_title(preset: Preset) -> str:
    if preset.is_regression:
        return f"{preset.dataset}, {preset.shot}-shot"
    size = f", {preset.image_size} pixels" * bool(preset.image_size)
    split = f" ({preset.split})" * bool(preset.split)
    return f"{preset.dataset}{split}, {preset.way}-way {preset.shot}-shot{size}"


def _parts_of_benchmark(benchmark: Benchmark) -> list[Part]:
    tested = [run for run in benchmark.runs if run.test is not None]
    untested = [run for run in benchmark.runs if run.test is None and run.validations]
    scores: list[Block] = []
    if tested:
        scores += [_scores(tested), pictures.scores(tested, _floor(benchmark)), *_floors(benchmark)]
    if untested:
        scores.append(_validation_scores(untested))
    return [
        Part("Scores", scores),
        Part("Learning curves", list(pictures.curves(benchmark.runs))),
        Part("Meta-gradients", list(pictures.gradients(benchmark.directories))),
        Part("Examples", list(pictures.examples(benchmark.directories))),
    ]


def _runs_table(directories: Sequence[SavedDirectory]) -> Table:
    rows = [
        (
            run.name, run.status, run.spec.learner, run.spec.order, f"{run.spec.inner_lr:g}",
            f"{directory.config['seed']}", str(directory.path),
        )
        for directory in directories
        for run in directory.runs
    ]  # fmt: skip
    header = ("run", "status", "learner", "order", "inner rate", "seed", "directory")
    return Table("The runs of this report", header, rows)


def _scores(runs: Runs) -> Table:
    """Returns the table of test scores per inner step."""
    counts = " or ".join(sorted({f"{run.num_test_tasks:,}" for run in runs}))
    return _per_inner_step(
        f"Test {_metric(runs)} after each inner step, with the 95 % confidence interval over "
        f"{counts} tasks",
        [(run.name, run, run.test) for run in runs],
    )


def _validation_scores(runs: Runs) -> Table:
    return _per_inner_step(
        f"Unfinished runs: last validation {_metric(runs)} after each inner step, with the 95 % "
        "confidence interval",
        [(f"{run.name}, outer step {run.validations[-1][0]:,}", run, run.validations[-1][1])
         for run in runs],
    )  # fmt: skip


def _per_inner_step(caption: str, columns: list[tuple[str, SavedRun, Any]]) -> Table:
    """Returns a table of scores, with one row per inner step or, for many runs, one per run."""
    headlines = {score.headline for _, _, score in columns}
    last = max(len(score.mean) for _, _, score in columns)
    mark = lambda i: f"{i} (headline)" if headlines == {i} else f"{i}"
    text = lambda run, score, i: (
        tables.score_text(run.preset, score, i) if i < len(score.mean) else NONE
    )
    rows = [(mark(i), *(text(run, score, i) for _, run, score in columns)) for i in range(last)]
    if any(score.num_nonfinite for _, _, score in columns):
        rows.append(("tasks not finite", *(f"{score.num_nonfinite}" for _, _, score in columns)))
    table = Table(caption, ("inner steps", *(name for name, _, _ in columns)), rows)
    return table if len(columns) <= MAX_COLUMNS else _transposed(table, "run \\ inner steps")


def _floors(benchmark: Benchmark) -> list[Block]:
    """Returns what the nearest neighbor reaches, which any learner should exceed."""
    found = [
        (directory.name, floor)
        for directory in benchmark.directories
        if (floor := _floor_of(directory)) is not None
    ]
    if not found:
        return []
    values = {f"{100 * floor:.1f} %" for _, floor in found}
    if len(values) == 1:
        return [Paragraph(f"Nearest neighbor on pixels, without training: {values.pop()}.")]
    listed = ", ".join(f"{100 * floor:.1f} % ({name})" for name, floor in found)
    return [Paragraph(f"Nearest neighbor on pixels, without training: {listed}.")]


def _floor(benchmark: Benchmark) -> float | None:
    """Returns the accuracy of the nearest neighbor, if it is the same for all directories."""
    found = {_floor_of(directory) for directory in benchmark.directories if directory.results}
    return found.pop() if len(found) == 1 else None


def _floor_of(directory: SavedDirectory) -> float | None:
    return ((directory.results or {}).get("floor") or {}).get("nearest_neighbour")


def _costs(runs: Runs) -> Table:
    """Returns the table of costs: one row per quantity or, for many runs, one per run."""
    quantities: dict[str, Callable[[SavedRun], str]] = {
        "outer steps": lambda run: f"{run.num_outer_steps:,}",
        "ms per outer step": lambda run: _number(run, "seconds_per_outer_step", 1e3),
        "s to compile": lambda run: _number(run, "compile_seconds"),
        "XLA temporary memory, MiB": lambda run: _number(run, "temp_bytes", 2.0**-20),
        "GFLOP per outer step": lambda run: _number(run, "flops", 1e-9),
    }
    rows = [(name, *(text(run) for run in runs)) for name, text in quantities.items()]
    table = Table("Costs of the training", ("", *(run.name for run in runs)), rows)
    return table if len(runs) <= MAX_COLUMNS else _transposed(table, "run")


def _number(run: SavedRun, name: str, factor: float = 1.0) -> str:
    value = run.results.get(name)
    return NONE if value is None else f"{factor * value:.3g}"


def _differences(directories: Sequence[SavedDirectory]) -> Block:
    names, rows = configurations.differences(directories)
    if not rows:
        several = len(names) > 1
        return Paragraph("The runs have the same settings." if several else "There is one run.")
    return Table("Settings that are not the same in all runs", ("setting", *names), rows)


def _latex(benchmark: Benchmark) -> Block:
    tested = [run for run in benchmark.runs if run.test is not None]
    if not tested:
        return Paragraph(f"{benchmark.title}: no run is tested yet.")
    text = latex.table(benchmark.title, tested)
    return Listing(f"Table of {benchmark.title}", text, "latex", is_open=True)


def _transposed(table: Table, corner: str) -> Table:
    header, *rows = zip(table.header, *table.rows, strict=True)
    return Table(table.caption, (corner, *header[1:]), rows)


def _metric(runs: Runs) -> str:
    preset = runs[0].preset
    return preset.metric if preset.is_regression else f"{preset.metric} in %"
