"""A LaTeX table of the test scores, to paste into a paper."""

from collections.abc import Sequence

import numpy as np

from jaxmaml.experiments.report.saved_runs import SavedRun

MAX_COLUMNS = 6
"""With more inner steps, the table has the first ones, and the step of the headline."""
_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


def table(title: str, runs: Sequence[SavedRun]) -> str:
    """Returns a table with one row per run and one column per inner step, for the package booktabs.

    Args:
        title: the tasks in words.
        runs: runs that are tested.
    """
    steps, preset = _steps(runs), runs[0].preset
    metric = "mean squared error" if preset.is_regression else r"accuracy in \%"
    tasks = " or ".join(sorted({f"{run.num_test_tasks:,}" for run in runs}))
    heads = [f"{i} step{'s' * (i != 1)}" for i in steps]
    lines = [
        r"% needs \usepackage{booktabs}",
        rf"% {escape(title)}: test {metric} after each number of inner steps,",
        rf"% with 95 \% confidence intervals over {tasks} tasks",
        rf"\begin{{tabular}}{{l{'c' * len(steps)}}}",
        r"\toprule",
        rf"{' & '.join(['run', *heads])} \\",
        r"\midrule",
        *(rf"{' & '.join([escape(run.name), *_cells(run, steps)])} \\" for run in runs),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    r"""Returns a text in which LaTeX gives no character a meaning of its own.

    >>> print(escape("maml_plus_plus & 5 %"))
    maml\_plus\_plus \& 5 \%
    """
    return "".join(_SPECIAL.get(character, character) for character in text)


def _steps(runs: Sequence[SavedRun]) -> list[int]:
    """Returns the inner steps that have a column."""
    scores = [run.test for run in runs if run.test is not None]
    last = max(len(score.mean) for score in scores) - 1
    if last < MAX_COLUMNS:
        return list(range(last + 1))
    return sorted({0, 1, 2, 3, *(score.headline for score in scores), last})[:MAX_COLUMNS]


def _cells(run: SavedRun, steps: Sequence[int]) -> list[str]:
    score = run.test
    assert score is not None
    factor, digits = (1, 3) if run.preset.is_regression else (100, 1)
    cells = []
    for i in steps:
        if i >= len(score.mean) or not np.isfinite(score.mean[i]):
            cells.append("--")
        else:
            mean, ci95 = factor * score.mean[i], factor * score.ci95[i]
            cells.append(rf"${mean:.{digits}f} \pm {ci95:.{digits}f}$")
    return cells
