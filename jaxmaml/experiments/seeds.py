"""Scores over several seeds of the same run: their mean and their spread."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.scoring import Score


class SeedScore(NamedTuple):
    """The scores of the runs that differ in their seed only, after 0..n inner steps.

    Attributes:
        seeds: the seeds, in the order of the runs.
        mean: the mean over seeds of the mean over tasks, `[n + 1]`, NaN where that of a run is.
        std: the standard deviation over seeds of the mean over tasks, `[n + 1]`.
        headline: the inner step whose score is quoted.
    """

    seeds: tuple[int, ...]
    mean: np.ndarray
    std: np.ndarray
    headline: int


def over_seeds(scores: Mapping[tuple[Spec, str], Score]) -> dict[str, SeedScore]:
    """Returns the scores over the seeds of each group of runs; nothing for runs without others.

    Args:
        scores: the scores by run and suffix, such as ", inductive" for another way to score it.

    >>> import numpy as np
    >>> scores = {
    ...     (Spec("exact, seed 0", "exact", 0.4, seed=0), ""): Score(np.array([0.5]), np.zeros(1), 0, 0),
    ...     (Spec("exact, seed 1", "exact", 0.4, seed=1), ""): Score(np.array([0.7]), np.zeros(1), 0, 0),
    ... }
    >>> found = over_seeds(scores)["exact"]
    >>> found.seeds, found.mean.round(3).tolist(), found.std.round(3).tolist()
    ((0, 1), [0.6], [0.141])
    """
    groups: dict[str, list[tuple[int, Score]]] = {}
    for (spec, suffix), score in scores.items():
        if spec.seed is not None:
            groups.setdefault(spec.group + suffix, []).append((spec.seed, score))
    return {name: _summary(found) for name, found in groups.items()}


def as_scores(found: Mapping[str, SeedScore]) -> dict[str, Score]:
    """Returns scores over seeds as tables take scores, with the deviation in place of `ci95`."""
    return {name: Score(one.mean, one.std, 0, one.headline) for name, one in found.items()}


def _summary(found: list[tuple[int, Score]]) -> SeedScore:
    means = np.stack([score.mean for _, score in found])
    return SeedScore(
        seeds=tuple(seed for seed, _ in found),
        mean=means.mean(axis=0),
        std=means.std(axis=0, ddof=1),
        headline=found[0][1].headline,
    )
