"""The pictures of a report: drawn from the numbers of the runs, or taken from their directories."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxmaml.experiments import figures, plots
from jaxmaml.experiments.references import Reference
from jaxmaml.experiments.report.blocks import Picture
from jaxmaml.experiments.report.saved_runs import SavedDirectory, SavedRun
from jaxmaml.experiments.run_dir import RunDir

MAX_POINTS = 100
"""The most points of a curve of the training loss; each is the mean of some outer steps."""
EXAMPLES = {
    "episode": "A test task and what the adapted model predicts for its query images",
    "regression": "A regression task, before and after adaptation",
    "trajectories": "Trajectories in test tasks, before and after adaptation",
    "frames": "The half-cheetah in a test task, after adaptation",
    "actions": "Probabilities of actions in a test task, before and after adaptation",
}
"""The plots of a run directory that show a task, with their captions."""


def scores(runs: Sequence[SavedRun], reference: Reference | None) -> Picture:
    """Returns the picture of the test scores after every inner step."""
    found = {
        _plain(run.name + suffix): score
        for run in runs
        for (_, suffix), score in run.scores().items()
    }
    preset = runs[0].preset
    figure = figures.metric_per_step(preset, found, reference)
    at_headline = preset.metric.scaled(score.mean[score.headline] for score in found.values())
    listed = ", ".join(
        f"{name} {_value(value)}" for name, value in zip(found, at_headline, strict=True)
    )
    return _picture(
        "scores", f"Test {preset.metric.of} after each inner step", figure,
        f"One line per run against the inner step. At the headline step: {listed}.",
    )  # fmt: skip


def curves(runs: Sequence[SavedRun]) -> Iterator[Picture]:
    """Yields the pictures of the validation scores and of the training loss along the outer steps."""
    preset = runs[0].preset
    validations = {
        _plain(run.name): figures.validation_curve(run.preset, run.validations)
        for run in runs
        if run.validations
    }
    if validations:
        headlines = {run.validations[-1][1].headline for run in runs if run.validations}
        name = figures.validation_name(preset, headlines)
        yield _picture(
            "validation", name[:1].upper() + name[1:],
            figures.learning_curves(preset, validations, headlines), _last_values(validations),
        )  # fmt: skip
    losses = {_plain(run.name): _loss_curve(run) for run in runs if len(run.query_loss)}
    if losses:
        width = max(_window(run.query_loss) for run in runs)
        mean = f", means over up to {width} outer steps" if width > 1 else ""
        yield _picture(
            "training", f"Query loss of the training{mean}",
            plots.learning_curves(losses, ylabel="training query loss"), _last_values(losses),
        )  # fmt: skip


def gradients(directories: Sequence[SavedDirectory]) -> Iterator[Picture]:
    """Yields the picture of first-order against exact meta-gradients of each directory with both."""
    for directory in directories:
        found = (directory.results or {}).get("gradient")
        if found and found["step"]:
            figure = plots.gradient_agreement(found["step"], found["cosine"], found["norm_ratio"])
            cosines, ratios = found["cosine"], found["norm_ratio"]
            yield _picture(
                "gradients",
                f"First-order against exact meta-gradients ({directory.name})",
                figure,
                f"Cosine from {_value(cosines[0])} to {_value(cosines[-1])}, ratio of the norms "
                f"from {_value(ratios[0])} to {_value(ratios[-1])}, between outer steps "
                f"{found['step'][0]:,} and {found['step'][-1]:,}.",
            )


def examples(directories: Sequence[SavedDirectory]) -> Iterator[Picture]:
    """Yields the plots of tasks that the directories hold."""
    for directory in directories:
        for name, caption in EXAMPLES.items():
            path = RunDir(directory.path).plot(name)
            if path.is_file():
                label = directory.runs[0].name
                yield Picture(
                    name, f"{caption} ({label})", f"{caption}, of the run {label}.",
                    path.read_bytes(),
                )  # fmt: skip


def _picture(name: str, caption: str, figure: Figure, alt: str) -> Picture:
    file = io.BytesIO()
    figure.suptitle("")  # the caption says it
    figure.savefig(file, format="png", dpi=150)
    return Picture(name, caption, alt, file.getvalue())


def _plain(name: str) -> str:
    """Returns a name that matplotlib shows as it is: without formulas, and not hidden."""
    shown = name.encode(errors="replace").decode().replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _loss_curve(run: SavedRun) -> dict[str, Any]:
    """Returns the means of windows of the losses, without skipped steps, at the end of each window."""
    width, number = _window(run.query_loss), len(run.query_loss)
    ends = [min(start + width, number) for start in range(0, number, width)]
    made = [np.arange(max(0, end - width), end) for end in ends]
    made = [steps[~run.skipped[steps]] for steps in made]
    means = [run.query_loss[steps].mean() if len(steps) else np.nan for steps in made]
    return {"step": ends, "value": means}


def _window(losses: np.ndarray) -> int:
    return max(1, -(-len(losses) // MAX_POINTS))


def _last_values(found: Mapping[str, plots.Curve]) -> str:
    listed = ", ".join(
        f"{name} {_value(curve['value'][-1])} at outer step {curve['step'][-1]:,}"
        for name, curve in found.items()
    )
    return f"One line per run against the outer step. Last values: {listed}."


def _value(number: float | None) -> str:
    return "not finite" if number is None or not np.isfinite(number) else f"{number:.3g}"
