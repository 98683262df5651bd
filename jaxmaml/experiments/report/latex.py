"""A LaTeX table of the test scores, to paste into a paper."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.scoring import Score

MAX_COLUMNS = 6
"""With more inner steps, the table has those of the headlines, the last one and the first ones."""
_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}  # fmt: skip


def table(title: str, preset: Preset, scores: Mapping[str, Score], spread: str) -> str:
    """Returns a table with one row per run and one column per inner step, for the package booktabs.

    Args:
        title: the tasks in words.
        preset: the settings of one of the runs.
        scores: the test scores, by the name of the run.
        spread: what the half widths of the scores are, in words.
    """
    steps = _steps(scores.values())
    metric = "mean squared error" if preset.is_regression else escape(preset.metric.of)
    heads = [f"{i} step{'s' * (i != 1)}" for i in steps]
    lines = [
        r"% needs \usepackage{booktabs}",
        rf"% {escape(title)}: test {metric} after each number of inner steps,",
        rf"% with {escape(spread)}",
        rf"\begin{{tabular}}{{l{'c' * len(steps)}}}",
        r"\toprule",
        rf"{' & '.join(['run', *heads])} \\",
        r"\midrule",
        *(
            rf"{' & '.join([escape(name), *_cells(preset, score, steps)])} \\"
            for name, score in scores.items()
        ),
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


def _steps(scores: Iterable[Score]) -> list[int]:
    """Returns the inner steps that have a column."""
    scores = list(scores)
    last = max(len(score.mean) for score in scores) - 1
    wanted = dict.fromkeys([*(score.headline for score in scores), last, *range(last)])
    return sorted(list(wanted)[:MAX_COLUMNS])


def _cells(preset: Preset, score: Score, steps: Sequence[int]) -> list[str]:
    factor, digits = preset.metric.factor, preset.metric.digits
    cells = []
    for i in steps:
        if i >= len(score.mean) or not np.isfinite(score.mean[i]):
            cells.append("--")
        else:
            mean, ci95 = factor * score.mean[i], factor * score.ci95[i]
            cells.append(rf"${mean:.{digits}f} \pm {ci95:.{digits}f}$")
    return cells
