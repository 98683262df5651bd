"""Candidates: the learners of a run, each built once and passed on to all that use it."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxmaml.batching import ChunkSize
from jaxmaml.experiments import learners, ranges
from jaxmaml.experiments.learners import LEARNERS, Entry, Recipe
from jaxmaml.experiments.networks import Model
from jaxmaml.experiments.presets import Preset
from jaxmaml.types import Array, MetaLearner


class Spec(NamedTuple):
    """The description of a run, as config.json stores it.

    Attributes:
        label: the name of the run.
        order: "exact" or "first".
        inner_lr: the inner learning rate.
        learner: a name of `learners.LEARNERS`.
        seed: the seed of the run, if there are others like it but for their seeds; else None.
    """

    label: str
    order: str
    inner_lr: float
    learner: str = learners.DEFAULT
    seed: int | None = None

    @property
    def group(self) -> str:
        """The name that the runs with different seeds share."""
        return self.label if self.seed is None else self.label.removesuffix(_of_seed(self.seed))


class Candidate(NamedTuple):
    """A run's learner, with what is needed to score it.

    Attributes:
        spec: the description of the run.
        learner: the learner.
        model: the functions of its network.
        num_test_inner_steps: inner steps in validation and test.
        headline_step: the inner step whose score is quoted.
        chunk_size: tasks computed at once, as the core takes it.
    """

    spec: Spec
    learner: MetaLearner
    model: Model
    num_test_inner_steps: int
    headline_step: int
    chunk_size: ChunkSize

    @property
    def label(self) -> str:
        """The name of the run."""
        return self.spec.label

    @property
    def entry(self) -> Entry:
        """The capabilities of the learner."""
        return LEARNERS[self.spec.learner]


def build(spec: Spec, preset: Preset, model: Model, num_classes: int, key: Array) -> Candidate:
    """Returns the candidate of a run.

    Args:
        spec: the description of the run.
        preset: the settings.
        model: the functions of the network.
        num_classes: classes of the training split; 0 for regression.
        key: the PRNG key of initial parameters that only this learner has.

    Raises:
        ValueError: an unknown learner or order, or one that does not suit the preset.
    """
    learners.check(preset, spec.learner, spec.order)
    entry = LEARNERS[spec.learner]
    recipe = Recipe(
        preset,
        model,
        num_classes,
        spec.inner_lr,
        learners.adjoint(preset, spec.order),
        entry.num_inner_steps(preset),
        key,
    )
    return Candidate(
        spec=spec,
        learner=entry.make(recipe),
        model=model,
        num_test_inner_steps=entry.num_test_inner_steps(preset),
        headline_step=entry.headline_step(preset),
        chunk_size=preset.core_chunk_size,
    )


def single(preset: Preset, learner: str, order: str | None = None) -> Spec:
    """Returns the description of a run of one learner at the preset's inner rate.

    Args:
        preset: the settings.
        learner: a name of `learners.LEARNERS` or `ALIASES`.
        order: "exact" or "first", for a learner that has both; defaults to exact.

    Raises:
        ValueError: an unknown learner, or an order for one that has no choice.

    >>> from jaxmaml.experiments import presets
    >>> single(presets.get("glyphs-5w1s"), "maml", "first").label
    'first'
    """
    name, own_order = learners.resolve(learner)
    if order is not None:
        learners.check_order(learner)
    order = order or own_order
    label = order if learner == learners.DEFAULT else learner
    return Spec(label, order, preset.inner_lr, name)


def comparison(
    preset: Preset, inner_lrs: Sequence[float] = (), names: Sequence[str] = ()
) -> list[Spec]:
    """Returns the descriptions of the runs of a comparison.

    Args:
        preset: the settings.
        inner_lrs: inner rates at which each learner runs; defaults to the preset's.
        names: names of `learners.LEARNERS` and `ALIASES`; defaults to exact and first-order MAML,
            whose runs are called "exact" and "first", and for a policy the one without adaptation.

    Raises:
        ValueError: a rate or a learner is given twice, a rate is out of its range, or a learner does
            not exist or has no inner rate.

    >>> from jaxmaml.experiments import presets
    >>> preset = presets.get("glyphs-5w1s")
    >>> [spec.label for spec in comparison(preset, [0.1, 2.0])]
    ['exact@0.1', 'first@0.1', 'exact@2', 'first@2']
    >>> [spec.label for spec in comparison(preset, [], ["fomaml", "reptile"])]
    ['fomaml', 'reptile']
    """
    for option, given in (("inner_lrs", inner_lrs), ("learners", names)):
        if len(set(given)) != len(given):
            raise ValueError(f"{option} must differ from each other; got {tuple(given)}")
    for rate in inner_lrs:
        ranges.check_number("each of inner_lrs", rate)
    runs = {name: learners.resolve(name) for name in names}
    runs = runs or _default_runs(preset)
    for label, (name, _) in runs.items():
        if inner_lrs and (reason := LEARNERS[name].why_unused(preset, "inner_lr")):
            raise ValueError(f"inner_lrs has no effect: learner {label!r} {reason}; leave one out")
    if not inner_lrs:
        return [Spec(label, order, preset.inner_lr, name) for label, (name, order) in runs.items()]
    return [
        Spec(f"{label}@{text}", order, rate, name)
        for rate, text in zip(inner_lrs, _texts(inner_lrs), strict=True)
        for label, (name, order) in runs.items()
    ]


def _default_runs(preset: Preset) -> dict[str, tuple[str, str]]:
    """Returns (learner, order) of the runs of a comparison by label, if none are asked for."""
    found = {order: (learners.DEFAULT, order) for order in learners.ADJOINTS}
    return found | (
        {} if preset.domain != "reinforcement" else {"pretrained": ("pretrained", "exact")}
    )


def for_each_seed(specs: Sequence[Spec], seed: int, num_seeds: int) -> list[Spec]:
    """Returns the descriptions of the runs of each of `num_seeds` seeds, `seed` being the first one.

    Args:
        specs: the descriptions of the runs of one seed.
        seed: the first seed.
        num_seeds: the number of seeds. One leaves the descriptions as they are.

    Raises:
        TypeError, ValueError: the number is not an integer from 1 to `ranges.MAX_SEEDS`.

    >>> [spec.label for spec in for_each_seed([Spec("exact", "exact", 0.4)], 3, 2)]
    ['exact, seed 3', 'exact, seed 4']
    """
    ranges.check_whole("num_seeds", num_seeds, maximum=ranges.MAX_SEEDS)
    if num_seeds == 1:
        return list(specs)
    return [
        spec._replace(label=spec.label + _of_seed(own), seed=own)
        for spec in specs
        for own in range(seed, seed + num_seeds)
    ]


def _of_seed(seed: int) -> str:
    return f", seed {seed}"


def _texts(rates: Sequence[float]) -> list[str]:
    """Returns the text of each rate: short, or all digits where short ones would be equal."""
    short = [f"{rate:g}" for rate in rates]
    return [
        repr(float(rate)) if short.count(text) > 1 else text
        for rate, text in zip(rates, short, strict=True)
    ]
