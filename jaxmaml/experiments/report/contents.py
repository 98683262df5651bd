"""The contents of a report: its parts, as blocks that each renderer writes in its own language."""

import collections
import datetime
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jaxmaml
from jaxmaml.experiments import references, seeds, tables
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.references import Reference
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
from jaxmaml.experiments.scoring import Score

MAX_COLUMNS = tables.MAX_COLUMNS
"""Up to this number of runs, each has a column; more of them have a row each."""
NONE = "-"
"""A cell without a value."""
_SEEDS = "mean ± standard deviation over seeds"
"""The spread of the scores of several seeds, in words."""

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
    """Returns what a reader has to know first: which runs did not reach their end; "" if all did."""
    unfinished = [f"{run.name} ({run.status})" for run in runs if run.test is None]
    stopped = [
        f"{run.name} ({run.results['stopped']})" for run in runs if run.results.get("stopped")
    ]
    sentences = {
        "Unfinished runs, shown as far as they came": unfinished,
        "Runs that a step that is not finite ended, tested with their last good state": stopped,
    }
    return " ".join(f"{text}: {', '.join(found)}." for text, found in sentences.items() if found)


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
    if preset.domain == "reinforcement":
        trajectories = f"{preset.num_trajectories} trajectories of {preset.horizon} steps"
        return f"{preset.dataset}, {trajectories}"
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
        scores += [_scores(tested), pictures.scores(tested, _reference(benchmark))]
        scores += _references(benchmark)
        scores += _seed_scores(benchmark)
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
            f"{run.seed}", str(directory.path),
        )
        for directory in directories
        for run in directory.runs
    ]  # fmt: skip
    header = ("run", "status", "learner", "order", "inner rate", "seed", "directory")
    return Table("The runs of this report", header, rows)


def _scores(runs: Runs) -> Table:
    """Returns the table of test scores per inner step."""
    return _per_inner_step(
        f"Test {_metric(runs)} after each inner step, with {_intervals(runs)}",
        runs[0].preset, _named_scores(runs),
    )  # fmt: skip


def _named_scores(runs: Runs) -> dict[str, Score]:
    """Returns the test scores of runs by name; first those of one state each, as in a run's table."""
    found = [
        (suffix, run.name + suffix, score)
        for run in runs
        for (_, suffix), score in run.scores().items()
    ]
    return {name: score for _, name, score in sorted(found, key=lambda one: one[0] != "")}


def _intervals(runs: Runs) -> str:
    counts = " or ".join(sorted({f"{run.num_test_tasks:,}" for run in runs}))
    return f"95 % confidence intervals over {counts} tasks"


def _seed_scores(benchmark: Benchmark) -> list[Table]:
    """Returns the table of means over seeds, with their standard deviations; [] for one seed each."""
    found = _over_seeds(benchmark)
    caption = f"Test {_metric(benchmark.runs)}, {_SEEDS}"
    return [_per_inner_step(caption, benchmark.runs[0].preset, found)] if found else []


def _over_seeds(benchmark: Benchmark) -> dict[str, Score]:
    """Returns the mean over seeds of each learner, with its standard deviation in place of `ci95`."""
    found = {}
    for directory in benchmark.directories:
        scores = {key: score for run in directory.runs for key, score in run.scores().items()}
        # The name of a run begins with that of its directory, if there are several.
        prefix = directory.runs[0].name.removesuffix(directory.runs[0].spec.label)
        found |= {
            f"{prefix}{name} ({len(over.seeds)} seeds)": over
            for name, over in seeds.over_seeds(scores).items()
        }
    return seeds.as_scores(found)


def _validation_scores(runs: Runs) -> Table:
    return _per_inner_step(
        f"Unfinished runs: last validation {_metric(runs)} after each inner step, with the 95 % "
        "confidence interval",
        runs[0].preset,
        {f"{run.name}, outer step {run.validations[-1][0]:,}": run.validations[-1][1]
         for run in runs},
    )  # fmt: skip


def _per_inner_step(caption: str, preset: Preset, named: dict[str, Score]) -> Table:
    """Returns a table of scores, with one row per inner step or, for many runs, one per run."""
    scores = named.values()
    headlines = {score.headline for score in scores}
    last = max(len(score.mean) for score in scores)
    mark = lambda i: f"{i} (headline)" if headlines == {i} else f"{i}"
    text = lambda score, i: tables.score_text(preset, score, i) if i < len(score.mean) else NONE
    rows = [(mark(i), *(text(score, i) for score in scores)) for i in range(last)]
    if any(score.num_nonfinite for score in scores):
        rows.append(("tasks not finite", *(f"{score.num_nonfinite}" for score in scores)))
    table = Table(caption, ("inner steps", *named), rows)
    return table if len(named) <= MAX_COLUMNS else _transposed(table, "run \\ inner steps")


def _references(benchmark: Benchmark) -> list[Block]:
    """Returns what the scores are compared with."""
    metric = benchmark.runs[0].preset.metric
    found = [
        (directory.name, reference)
        for directory in benchmark.directories
        if (reference := _reference_of(directory)) is not None
    ]
    if not found:
        return []
    text = lambda value: f"{metric.text(value)} {metric.unit}".strip()
    listed = [f"{text(reference.value)} ({name})" for name, reference in found]
    values = {text(reference.value) for _, reference in found}
    shown = values.pop() if len(values) == 1 else ", ".join(listed)
    return [Paragraph(f"{found[0][1].sentence}: {shown}.")]


def _reference(benchmark: Benchmark) -> Reference | None:
    """Returns the reference, if it is the same for all directories."""
    found = {_reference_of(directory) for directory in benchmark.directories if directory.results}
    return found.pop() if len(found) == 1 else None


def _reference_of(directory: SavedDirectory) -> Reference | None:
    domain = directory.runs[0].preset.domain
    stored = (directory.results or {}).get("floor") or {}
    return references.named(domain, stored.get(references.KEYS.get(domain)))


def _costs(runs: Runs) -> Table:
    """Returns the table of costs: one row per quantity or, for many runs, one per run."""
    quantities: dict[str, Callable[[SavedRun], str]] = {
        "outer steps": lambda run: f"{run.num_outer_steps:,}",
        "ms per outer step": lambda run: _number(run, "seconds_per_outer_step", 1e3),
        "s to compile": lambda run: _number(run, "compile_seconds"),
        "XLA temporary memory, MiB": lambda run: _number(run, "temp_bytes", 2.0**-20),
        "GFLOP per outer step": lambda run: (
            NONE
            if run.results.get("flops") is None
            else tables.gflop(run.preset, run.results["flops"])
        ),
    }
    # What most runs have none of.
    if any(run.num_skipped for run in runs):
        quantities["left out, not finite"] = lambda run: f"{run.num_skipped:,}"
    selected = {run.name: run.results.get("selected_step") for run in runs}
    if any(selected[run.name] not in (None, run.num_outer_steps) for run in runs):
        quantities["selected by validation"] = lambda run: (
            NONE if selected[run.name] is None else f"{selected[run.name]:,}"
        )
    rows = [(name, *(text(run) for run in runs)) for name, text in quantities.items()]
    table = Table("Costs of the training", ("", *(run.name for run in runs)), rows)
    return table if len(runs) <= MAX_COLUMNS else _transposed(table, "run")


def _number(run: SavedRun, name: str, factor: float = 1.0) -> str:
    value = run.results.get(name)
    return NONE if value is None else tables.rounded(factor * value)


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
    title, preset = benchmark.title, tested[0].preset
    text = latex.table(title, preset, _named_scores(tested), _intervals(tested))
    if over := _over_seeds(benchmark):
        text += "\n" + latex.table(title, preset, over, _SEEDS)
    return Listing(f"Table of {title}", text, "latex", is_open=True)


def _transposed(table: Table, corner: str) -> Table:
    header, *rows = zip(table.header, *table.rows, strict=True)
    return Table(table.caption, (corner, *header[1:]), rows)


def _metric(runs: Runs) -> str:
    return runs[0].preset.metric.of
