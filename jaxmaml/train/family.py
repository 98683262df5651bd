"""The learners that the commands know by name, made of a preset's network."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import jaxmaml
from jaxmaml.learners import heads
from jaxmaml.train import network
from jaxmaml.train.network import Model
from jaxmaml.train.presets import Preset
from jaxmaml.types import MetaLearner

ORDERS = ("exact", "first")
NUM_REPTILE_STEPS = 5
"""Inner steps of Reptile at least, which with one would be joint training; its paper's number."""
NUM_IMAML_STEPS = 16
"""Inner steps of iMAML at least, whose gradient is that of a minimum; its paper's number (Omniglot)."""
NUM_FINE_TUNING_STEPS = 20
"""Inner steps of fine-tuning at least, in tests alone: its head starts from nothing that was trained."""
IMAML_PROXIMAL = 2.0
"""Strength of iMAML's proximal term; its paper's number (Omniglot)."""


class Parts(NamedTuple):
    """What a learner is made of: hashable, so that equal parts are compiled once.

    Attributes:
        preset: the settings.
        model: the network's functions.
        num_classes: classes of the training split, for joint pre-training; 0 for regression.
    """

    preset: Preset
    model: Model
    num_classes: int


class Entry(NamedTuple):
    """A learner that has a name.

    Attributes:
        make: `(parts, inner_lr, order) -> MetaLearner`.
        has_order: whether its meta-gradient is exact or first order.
        num_inner_steps: `(preset) -> ` inner steps in training.
        has_any_way: whether it serves more ways than its head has.
    """

    make: Callable[[Parts, Any, str], MetaLearner]
    has_order: bool = True
    num_inner_steps: Callable[[Preset], int] = lambda preset: preset.num_inner_steps
    has_any_way: bool = False


def make(parts: Parts, learner: str, order: str, inner_lr: Any) -> MetaLearner:
    """A learner of `LEARNERS`; the inner rate may be traced."""
    return LEARNERS[learner].make(parts, inner_lr, order)


def resolve(name: str) -> tuple[str, str]:
    """(learner, order) of a name of `LEARNERS` or `ALIASES`.

    Raises:
        ValueError: there is none; the message suggests the nearest.

    >>> resolve("fomaml")
    ('maml', 'first')
    """
    if name in ALIASES:
        return ALIASES[name]
    if name in LEARNERS:
        return name, "exact"
    names = [*LEARNERS, *ALIASES]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    raise ValueError(
        f"unknown learner {name!r}: did you mean {near[0]!r}? The learners are {', '.join(names)}"
    )


def check(parts: Parts, learner: str, order: str) -> None:
    """Raises ValueError unless learner and order exist, and fit each other and the preset."""
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}: it is one of {', '.join(ORDERS)}")
    resolve(learner)
    if order == "first" and not LEARNERS[learner].has_order:
        raise ValueError(f"learner {learner!r} has no order to choose: leave order at 'exact'")
    if learner in NEEDS_CLASSES and parts.preset.is_regression:
        raise ValueError(
            f"learner {learner!r} classifies, and {parts.preset.dataset} is regression"
        )
    if parts.preset.norm == "per_step" and learner != "maml_plus_plus":
        raise ValueError(
            f"norm='per_step' counts inner steps, which learner {learner!r} does not begin anew with "
            "each task: only 'maml_plus_plus' does"
        )
    if learner in WITHOUT_STATE and parts.model.has_state:
        raise ValueError(
            f"learner {learner!r} takes no norm={parts.preset.norm!r}, which carries statistics"
        )


def num_test_inner_steps(preset: Preset, learner: str) -> int:
    """Inner steps of a test: the preset's, or as many as the learner trains with if that is more."""
    in_training = LEARNERS[learner].num_inner_steps(preset)
    if learner in HEAD_FILLING:
        return 0
    return max(preset.num_test_inner_steps, in_training)


def headline_step(preset: Preset, learner: str) -> int:
    """The inner step whose score is quoted: the preset's, or the last where it trains with more."""
    last = num_test_inner_steps(preset, learner)
    return preset.headline_step if last == preset.num_test_inner_steps else last


def needs_class_numbers(preset: Preset, learner: str) -> bool:
    """Whether training batches must tell each example's class among all."""
    return learner == "fine_tuning" and not preset.is_regression


def _mask(preset: Preset) -> Any:
    adapts_all = preset.adapt_norm or preset.norm == "none"
    return None if adapts_all else lambda path: "norm/" not in path


def _shared(parts: Parts, order: str, *, mask: bool = True) -> dict[str, Any]:
    """Options that every learner with an inner loop takes."""
    model = parts.model
    options = {
        "order": order, "outer_loss_fn": model.outer_loss_fn, "test_loss_fn": model.test_loss_fn,
        "has_state": model.has_state, "refresh_state": model.refresh_state,
    }  # fmt: skip
    return options | ({"mask": _mask(parts.preset)} if mask else {})


def _steps(parts: Parts) -> int:
    return parts.preset.num_inner_steps


def _plain(constructor: Callable[..., MetaLearner], *, mask: bool = True) -> Any:
    """`make` of a learner that takes what `jaxmaml.maml` takes; without `mask` it has its own."""

    def make(parts: Parts, inner_lr: Any, order: str) -> MetaLearner:
        options = _shared(parts, order, mask=mask)
        return constructor(parts.model.loss_fn, optax.sgd(inner_lr), _steps(parts), **options)

    return make


def _maml_plus_plus(parts: Parts, inner_lr: Any, order: str) -> MetaLearner:
    """The multi-step loss is annealed over the first tenth of training, as in the paper."""
    number = max(1, parts.preset.num_outer_steps // 10)
    return jaxmaml.maml_plus_plus(
        parts.model.loss_fn, _steps(parts),
        inner_lr=inner_lr, multi_step_loss=number, **_shared(parts, order),
    )  # fmt: skip


def _meta_sgd(parts: Parts, inner_lr: Any, order: str) -> MetaLearner:
    options = _shared(parts, order)
    return jaxmaml.meta_sgd(parts.model.loss_fn, _steps(parts), inner_lr=inner_lr, **options)


def _unicorn(parts: Parts, inner_lr: Any, order: str) -> MetaLearner:
    return jaxmaml.unicorn(
        parts.model.loss_fn, optax.sgd(inner_lr), _steps(parts),
        way=parts.preset.way, **_shared(parts, order),
    )  # fmt: skip


def _proto_maml(parts: Parts, inner_lr: Any, order: str) -> MetaLearner:
    return jaxmaml.proto_maml(
        parts.model.loss_fn, optax.sgd(inner_lr), _steps(parts), _features_fn(parts),
        way=parts.preset.way, **_shared(parts, order),
    )  # fmt: skip


def _cavia(parts: Parts, inner_lr: Any, order: str) -> MetaLearner:
    """On the preset's network with features that a context scales and shifts."""
    learner = _plain(jaxmaml.cavia, mask=False)(parts, inner_lr, order)
    return learner._replace(init=lambda params: network.add_context(params, jax.random.key(0)))


def _reptile(parts: Parts, inner_lr: Any, order: str) -> MetaLearner:
    options = _shared(parts, order)
    for name in ("order", "refresh_state"):
        del options[name]
    number = LEARNERS["reptile"].num_inner_steps(parts.preset)
    return jaxmaml.reptile(parts.model.loss_fn, optax.sgd(inner_lr), number, **options)


def _imaml(parts: Parts, inner_lr: Any, order: str) -> MetaLearner:
    del order
    number = LEARNERS["imaml"].num_inner_steps(parts.preset)
    return jaxmaml.imaml(
        parts.model.loss_fn, optax.sgd(inner_lr), number, **imaml_options(parts.preset)
    )  # fmt: skip


def imaml_options(preset: Preset) -> dict[str, Any]:
    """What iMAML is made with, and `diagnostics.cg_residual` is to know."""
    return {"proximal": IMAML_PROXIMAL, "mask": _mask(preset)}


def _fine_tuning(parts: Parts, inner_lr: Any, order: str) -> MetaLearner:
    del order
    classes = None
    if not parts.preset.is_regression:
        classes = jaxmaml.learners.Classes(_features_fn(parts), parts.num_classes)
    return jaxmaml.fine_tuning(
        parts.model.loss_fn, optax.sgd(inner_lr),
        LEARNERS["fine_tuning"].num_inner_steps(parts.preset),
        classes=classes, mask=_mask(parts.preset),
    )  # fmt: skip


def _protonet(parts: Parts, inner_lr: Any, order: str) -> MetaLearner:
    del inner_lr, order
    return jaxmaml.protonet(parts.model.loss_fn, _features_fn(parts), way=parts.preset.way)


def _r2d2(parts: Parts, inner_lr: Any, order: str) -> MetaLearner:
    del inner_lr, order
    return jaxmaml.r2d2(parts.model.loss_fn, _features_fn(parts), way=parts.preset.way)


def _features_fn(parts: Parts) -> heads.FeaturesFn:
    assert parts.model.features_fn is not None  # `check` has refused what has none
    return parts.model.features_fn


def _at_least(number: int) -> Callable[[Preset], int]:
    return lambda preset: max(number, preset.num_inner_steps)


def _none(preset: Preset) -> int:
    del preset
    return 0


LEARNERS: dict[str, Entry] = {
    "maml": Entry(_plain(jaxmaml.maml)),
    "maml_plus_plus": Entry(_maml_plus_plus),
    "anil": Entry(_plain(jaxmaml.anil, mask=False)),
    "boil": Entry(_plain(jaxmaml.boil, mask=False)),
    "meta_sgd": Entry(_meta_sgd),
    "meta_curvature": Entry(_plain(jaxmaml.meta_curvature)),
    "cavia": Entry(_cavia),
    "unicorn": Entry(_unicorn, has_any_way=True),
    "proto_maml": Entry(_proto_maml, has_any_way=True),
    "reptile": Entry(_reptile, has_order=False, num_inner_steps=_at_least(NUM_REPTILE_STEPS)),
    "imaml": Entry(_imaml, has_order=False, num_inner_steps=_at_least(NUM_IMAML_STEPS)),
    "protonet": Entry(_protonet, has_order=False, num_inner_steps=_none, has_any_way=True),
    "r2d2": Entry(_r2d2, has_order=False, num_inner_steps=_none, has_any_way=True),
    "fine_tuning": Entry(
        _fine_tuning, has_order=False, num_inner_steps=_at_least(NUM_FINE_TUNING_STEPS)
    ),
}
"""Every learner of the commands, by name."""
ALIASES = {"fomaml": ("maml", "first")}
"""Names of a learner with an order."""
HEAD_FILLING = ("protonet", "r2d2")
NEEDS_CLASSES = (*HEAD_FILLING, "proto_maml", "unicorn")
WITHOUT_STATE = (*HEAD_FILLING, "proto_maml", "imaml", "fine_tuning", "cavia")
