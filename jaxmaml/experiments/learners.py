"""The learners that the commands know by name, and what each of them can do."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import optax

import jaxmaml
from jaxmaml.adjoints import Adjoint, Exact, FirstOrder
from jaxmaml.checks import check_choice, check_known
from jaxmaml.experiments import networks, settings
from jaxmaml.experiments.domains import Domain
from jaxmaml.experiments.networks import Model
from jaxmaml.experiments.presets import Preset
from jaxmaml.learners import heads
from jaxmaml.types import Array, Mask, MetaLearner

IMAGES: tuple[Domain, ...] = ("classification",)
EXAMPLES: tuple[Domain, ...] = ("classification", "regression")
ALL: tuple[Domain, ...] = (*EXAMPLES, "reinforcement")
"""The domains of learners."""
ADJOINTS: dict[str, Adjoint] = {"exact": Exact(), "first": FirstOrder()}
"""The orders of the command line, and the adjoints that they stand for."""
DEFAULT = "maml"
"""The learner that needs no name: its runs are called by their order."""
IMAML_PROXIMAL, IMAML_DAMPING = 0.1, 20.0
"""The strength of iMAML's proximal term, and what is added to the Hessian besides.

Without damping the Hessian of a network with batch statistics is not positive definite, and conjugate
gradients end anywhere. The authors' published script solves with the Hessian plus 24, although its
inner steps have no proximal term: a weak one is better than 0.5, the least in their paper.
"""
STEP_SETTINGS = ("num_inner_steps", "num_test_inner_steps", "headline_step")
"""The settings that a learner may replace by more steps, see `Entry`."""
NOT_IN_FILLED = ("inner_lr", "adapt_norm", "head_scale", *STEP_SETTINGS)
"""The settings that a learner does not use if it computes the head from the support."""


class Recipe(NamedTuple):
    """The ingredients of a learner.

    Attributes:
        preset: the settings.
        model: the functions of the network.
        num_classes: classes of the training split, for joint pre-training; 0 for regression.
        inner_lr: the inner learning rate.
        adjoint: how the meta-gradient is computed.
        num_inner_steps: inner steps in training.
        key: the PRNG key of initial parameters that only this learner has.
    """

    preset: Preset
    model: Model
    num_classes: int
    inner_lr: float
    adjoint: Adjoint
    num_inner_steps: int
    key: Array


class Entry(NamedTuple):
    """A learner of the commands and its capabilities.

    Attributes:
        make: `(recipe) -> MetaLearner`.
        has_order: its meta-gradient is exact or first order.
        domains: what it can be used for.
        takes_state: it works with normalizations that carry statistics.
        serves_any_way: it can be tested with more classes than its head has outputs.
        fills_head: it computes the head from the support, without inner steps.
        trains_unadapted: it makes inner steps in tests only.
        counts_inner_steps: it numbers its inner steps from 0 for each task, as norm="per_step" needs.
        needs_class_numbers: as a classifier, it trains on the number of each example's class among
            all training classes.
        solves_linear_system: its meta-gradient is the approximate solution of a linear system, whose
            residual can be measured.
        least_inner_steps: it trains with at least this number of inner steps.
        unused: the settings of a preset that it does not use.
    """

    make: Callable[[Recipe], MetaLearner]
    has_order: bool = True
    domains: tuple[Domain, ...] = EXAMPLES
    takes_state: bool = True
    serves_any_way: bool = False
    fills_head: bool = False
    trains_unadapted: bool = False
    counts_inner_steps: bool = False
    needs_class_numbers: bool = False
    solves_linear_system: bool = False
    least_inner_steps: int = 0
    unused: tuple[str, ...] = ()

    def num_inner_steps(self, preset: Preset) -> int:
        """Returns the number of inner steps in training."""
        if self.fills_head or self.trains_unadapted:
            return 0
        return max(self.least_inner_steps, preset.num_inner_steps)

    def num_test_inner_steps(self, preset: Preset) -> int:
        """Returns the number of inner steps in a test, no less than in training."""
        if self.fills_head:
            return 0
        return max(preset.num_test_inner_steps, self.num_inner_steps(preset))

    def headline_step(self, preset: Preset) -> int:
        """Returns the inner step whose score is quoted.

        It is the preset's, or the last step where the learner makes more steps than the preset.
        """
        last = self.num_test_inner_steps(preset)
        return preset.headline_step if last == preset.num_test_inner_steps else last

    def why_unused(self, preset: Preset, setting: str) -> str:
        """Returns why this learner does not use the value of a setting; "" if it does."""
        if setting in self.unused:
            return "does not use it"
        if setting in STEP_SETTINGS:
            made, given = getattr(self, setting)(preset), getattr(preset, setting)
            return "" if made == given else f"uses {setting}={made} instead"
        return ""


def resolve(name: str) -> tuple[str, str]:
    """Returns (learner, order) for a name of `LEARNERS` or `ALIASES`.

    Raises:
        ValueError: no learner has this name; the message suggests a near one.

    >>> resolve("fomaml")
    ('maml', 'first')
    """
    check_known("learner", name, [*LEARNERS, *ALIASES])
    return ALIASES.get(name, (name, "exact"))


def of_domain(domain: Domain) -> list[str]:
    """Returns the names of the learners that can be used for a domain.

    >>> of_domain("reinforcement")
    ['maml', 'meta_sgd', 'pretrained']
    """
    return [name for name, entry in LEARNERS.items() if domain in entry.domains]


def check(preset: Preset, learner: str, order: str) -> None:
    """Raises ValueError unless a learner and an order exist and suit each other and the preset."""
    check_choice("order", order, tuple(ADJOINTS))
    entry = LEARNERS[resolve(learner)[0]]
    if order == "first" and not entry.has_order:
        raise ValueError(f"learner {learner!r} has no order to choose: leave order at 'exact'")
    if preset.domain not in entry.domains:
        able = ", ".join(of_domain(preset.domain))
        raise ValueError(
            f"learner {learner!r} is for {' and '.join(entry.domains)}, but {preset.dataset} is "
            f"{preset.domain}: {able} can be used"
        )
    if preset.norm == "per_step" and not entry.counts_inner_steps:
        able = ", ".join(repr(name) for name, entry in LEARNERS.items() if entry.counts_inner_steps)
        raise ValueError(
            f"norm='per_step' is that of MAML++: only {able} can be used with it, not learner "
            f"{learner!r}"
        )
    if preset.norm in networks.CARRIES_STATE and not entry.takes_state:
        raise ValueError(
            f"learner {learner!r} does not support norm={preset.norm!r}, which carries statistics"
        )


def check_used(preset: Preset, given: Iterable[str], names: Sequence[str]) -> None:
    """Raises ValueError if a setting that a user has given has no effect.

    Args:
        preset: the settings.
        given: the names of the settings that the user has given.
        names: the learners that run, of which one at least must use each setting.

    >>> from jaxmaml.experiments import presets
    >>> check_used(presets.get("glyphs-5w1s"), ["inner_lr"], ["maml", "protonet"])
    """
    for setting in given:
        if reason := settings.why_unused(preset, setting):
            raise ValueError(
                f"{setting} has no effect on {preset.name} with {reason}: leave it out"
            )
        reasons = [LEARNERS[name].why_unused(preset, setting) for name in names]
        if names and all(reasons):
            raise ValueError(
                f"{setting} has no effect: learner {names[0]!r} {reasons[0]}; leave it out"
            )


def adjoint(preset: Preset, order: str) -> Adjoint:
    """Returns how an order computes the meta-gradient.

    A trust region needs the derivative of the adaptation in forward mode, which the default of the
    exact adjoint does not have.
    """
    if order == "exact" and preset.outer == "trpo":
        return Exact(mode="reverse")
    return ADJOINTS[order]


def check_way(way: int, trained_way: int, names: Iterable[str]) -> None:
    """Raises ValueError if tasks have more classes than a learner can serve.

    Args:
        way: the classes of the tasks.
        trained_way: the outputs of the trained head.
        names: the learners.

    >>> check_way(7, 5, ["protonet"])
    """
    able = [name for name, entry in LEARNERS.items() if entry.serves_any_way]
    if way > trained_way and any(name not in able for name in names):
        raise ValueError(
            f"way={way}: the run was trained with way={trained_way}, and its head has no more outputs; "
            f"use {trained_way} classes at most, or train one of the learners {', '.join(able)}"
        )


def check_order(learner: str) -> None:
    """Raises ValueError if a learner's name leaves no order of the meta-gradient to choose.

    >>> check_order("maml")
    """
    name, order = resolve(learner)
    if not LEARNERS[name].has_order:
        raise ValueError(f"order has no effect: learner {learner!r} has no order; leave it out")
    if learner in ALIASES:
        raise ValueError(f"order has no effect: learner {learner!r} is {order} order; leave it out")


def needs_class_numbers(preset: Preset, learner: str) -> bool:
    """Returns whether training batches need the number of each example's class among all classes."""
    return LEARNERS[learner].needs_class_numbers and preset.domain == "classification"


def _mask(preset: Preset) -> Mask:
    """Returns the mask of the parameters that the inner loop adapts."""
    adapts_all = preset.adapt_norm or preset.norm == "none"
    return None if adapts_all else lambda path: "norm/" not in path


def _shared(recipe: Recipe, *, mask: bool = True) -> dict[str, Any]:
    """Returns the options of every learner with an inner loop."""
    model = recipe.model
    options = {
        "adjoint": recipe.adjoint, "query_loss_fn": model.query_loss_fn,
        "test_loss_fn": model.test_loss_fn, "refresh_state": model.refresh_state,
    }  # fmt: skip
    options |= {} if model.at_step is None else {"at_step": model.at_step}
    return options | ({"mask": _mask(recipe.preset)} if mask else {})


def _plain(
    constructor: Callable[..., MetaLearner], *, mask: bool = True
) -> Callable[[Recipe], MetaLearner]:
    """Returns the `make` of a learner with the signature of `jaxmaml.maml`.

    Args:
        constructor: makes the learner.
        mask: whether it takes a mask; without one, it has its own.
    """

    def make(recipe: Recipe) -> MetaLearner:
        return constructor(*_problem(recipe), **_shared(recipe, mask=mask))

    return make


def _problem(recipe: Recipe) -> tuple[Any, optax.GradientTransformation, int]:
    """Returns the positional arguments of `jaxmaml.maml`."""
    return recipe.model.loss_fn, optax.sgd(_inner_rate(recipe)), recipe.num_inner_steps


def _inner_rate(recipe: Recipe) -> float | optax.Schedule:
    first, later = recipe.inner_lr, recipe.preset.later_inner_lr
    return optax.join_schedules([lambda _: first, lambda _: later], [1]) if later else first


def _maml_plus_plus(recipe: Recipe) -> MetaLearner:
    """Anneals the multi-step loss over the first tenth of training, as in the paper."""
    num_annealed = max(1, recipe.preset.num_outer_steps // 10)
    return jaxmaml.maml_plus_plus(
        recipe.model.loss_fn, recipe.num_inner_steps, inner_lr=recipe.inner_lr,
        query_weights=jaxmaml.multi_step_weights(recipe.num_inner_steps, num_annealed),
        **_shared(recipe),
    )  # fmt: skip


def _meta_sgd(recipe: Recipe) -> MetaLearner:
    return jaxmaml.meta_sgd(
        recipe.model.loss_fn, recipe.num_inner_steps, inner_lr=recipe.inner_lr, **_shared(recipe)
    )


def _unicorn(recipe: Recipe) -> MetaLearner:
    return jaxmaml.unicorn(*_problem(recipe), way=recipe.preset.way, **_shared(recipe))


def _proto_maml(recipe: Recipe) -> MetaLearner:
    return jaxmaml.proto_maml(
        *_problem(recipe), _features_fn(recipe), way=recipe.preset.way, **_shared(recipe)
    )


def _cavia(recipe: Recipe) -> MetaLearner:
    """Makes CAVIA on the preset's network, with features that a context scales and shifts."""
    learner = _plain(jaxmaml.cavia, mask=False)(recipe)
    return learner._replace(init=lambda params: networks.add_context(params, recipe.key))


def _reptile(recipe: Recipe) -> MetaLearner:
    options = _shared(recipe)
    for name in ("adjoint", "refresh_state"):
        del options[name]
    return jaxmaml.reptile(*_problem(recipe), **options)


def _imaml(recipe: Recipe) -> MetaLearner:
    options = _shared(recipe)
    del options["adjoint"]
    options |= {"proximal": IMAML_PROXIMAL, "damping": IMAML_DAMPING}
    return jaxmaml.imaml(*_problem(recipe), **options)


def _fine_tuning(recipe: Recipe) -> MetaLearner:
    classes = None
    if not recipe.preset.is_regression:
        classes = jaxmaml.TrainingClasses(_features_fn(recipe), recipe.num_classes)
    return jaxmaml.fine_tuning(*_problem(recipe), classes=classes, mask=_mask(recipe.preset))


def _protonet(recipe: Recipe) -> MetaLearner:
    return jaxmaml.protonet(recipe.model.loss_fn, _features_fn(recipe), way=recipe.preset.way)


def _r2d2(recipe: Recipe) -> MetaLearner:
    return jaxmaml.r2d2(recipe.model.loss_fn, _features_fn(recipe), way=recipe.preset.way)


def _features_fn(recipe: Recipe) -> heads.FeaturesFn:
    assert recipe.model.features_fn is not None  # `check` has refused a model without one
    return recipe.model.features_fn


LEARNERS: dict[str, Entry] = {
    "maml": Entry(_plain(jaxmaml.maml), domains=ALL),
    "maml_plus_plus": Entry(_maml_plus_plus, counts_inner_steps=True),
    "anil": Entry(_plain(jaxmaml.anil, mask=False), unused=("adapt_norm",)),
    "boil": Entry(_plain(jaxmaml.boil, mask=False), unused=("adapt_norm",)),
    "meta_sgd": Entry(_meta_sgd, domains=ALL, unused=("later_inner_lr",)),
    "meta_curvature": Entry(_plain(jaxmaml.meta_curvature)),
    "cavia": Entry(_cavia, takes_state=False, unused=("adapt_norm",)),
    # The head that it starts from cancels under the softmax.
    "unicorn": Entry(
        _unicorn, domains=IMAGES, serves_any_way=True, unused=("head_scale",),
    ),
    "proto_maml": Entry(
        _proto_maml, domains=IMAGES, serves_any_way=True, takes_state=False,
        unused=("head_scale",),
    ),
    # With one inner step, Reptile would be joint training. Its paper makes 5.
    "reptile": Entry(_reptile, has_order=False, least_inner_steps=5),
    # iMAML's gradient is that of a minimum. Its paper makes 16 steps (Omniglot).
    "imaml": Entry(
        _imaml, has_order=False, least_inner_steps=16, solves_linear_system=True,
    ),
    "protonet": Entry(
        _protonet, has_order=False, domains=IMAGES, serves_any_way=True, takes_state=False,
        fills_head=True, unused=NOT_IN_FILLED,
    ),
    "r2d2": Entry(
        _r2d2, has_order=False, domains=IMAGES, serves_any_way=True, takes_state=False,
        fills_head=True, unused=NOT_IN_FILLED,
    ),
    # In a test, its head starts from scratch.
    "fine_tuning": Entry(
        _fine_tuning, has_order=False, least_inner_steps=20, takes_state=False,
        needs_class_numbers=True,
    ),
    # The policy that is best without adaptation: the baseline of the MAML paper.
    "pretrained": Entry(
        _plain(jaxmaml.maml), has_order=False, domains=("reinforcement",), trains_unadapted=True,
        unused=("num_inner_steps",),
    ),
}  # fmt: skip
"""Every learner of the commands, by name."""
ALIASES = {"fomaml": ("maml", "first")}
"""Names of a learner with an order."""
