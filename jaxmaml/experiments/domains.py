"""The domains of meta-learning, and the score of each."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

Domain: TypeAlias = Literal["classification", "regression", "reinforcement"]
"""The kind of problem that a task is."""

ENVIRONMENTS = ("nav2d", "bandits", "tabular-mdp", "cheetah-dir", "cheetah-vel")
"""The values of `dataset` that are environments of reinforcement learning."""


class Metric(NamedTuple):
    """The score of a test, and how it is written.

    Attributes:
        name: as in the label of an axis.
        key: its name in results.json.
        factor: what it is multiplied by where it is written; 100 for percent.
        digits: its digits after the decimal point.
        higher_is_better: whether it is; otherwise it is an error.
    """

    name: str
    key: str
    factor: float
    digits: int
    higher_is_better: bool

    @property
    def unit(self) -> str:
        """Its unit, as in a text: "%", or "" if it has none."""
        return "%" if self.factor == 100 else ""

    @property
    def of(self) -> str:
        """Its name with its unit."""
        return f"{self.name} in {self.unit}" if self.unit else self.name

    def scaled(self, values: Iterable[float | None]) -> list[float]:
        """Returns scores in the unit of their texts, as plots show them; NaN where there is none.

        >>> METRICS["classification"].scaled([0.5, None])
        [50.0, nan]
        """
        return [math.nan if value is None else self.factor * value for value in values]

    def text(self, *values: float) -> str:
        """Returns numbers with the digits of the score: a mean, and the half width of an interval.

        >>> METRICS["classification"].text(0.5, 0.01)
        '50.0 ± 1.0'
        """
        return " ± ".join(f"{self.factor * value:.{self.digits}f}" for value in values)

    def short(self, value: float) -> str:
        """Returns a value with what it is, as a progress bar shows it.

        >>> METRICS["classification"].short(0.5), METRICS["regression"].short(0.25)
        ('50.0 %', 'MSE 0.25')
        """
        return f"{self.text(value)} {self.unit}" if self.unit else f"{self.name} {value:.3g}"


METRICS: dict[str, Metric] = {
    "classification": Metric("accuracy", "accuracy_per_step", 100, 1, True),
    "regression": Metric("MSE", "mse_per_step", 1, 3, False),
    "reinforcement": Metric("return", "return_per_step", 1, 2, True),
}
"""The score of each domain."""


def domain_of(dataset: str) -> Domain:
    """Returns the domain of a dataset or an environment.

    >>> domain_of("nav2d"), domain_of("folder:/pictures")
    ('reinforcement', 'classification')
    """
    if dataset in ENVIRONMENTS:
        return "reinforcement"
    return "regression" if dataset == "sinusoid" else "classification"
