"""The network of a preset as pure functions: its outputs, losses, metric and features."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmaml import metrics, nn
from jaxmaml.experiments.presets import Preset
from jaxmaml.types import Array, LossFn, Params, State

CARRIES_STATE = ("inductive", "running", "per_step")
"""The normalizations that carry statistics."""
NUM_CONTEXT = 100
"""Context parameters of CAVIA's network, as in its paper (miniImageNet)."""


class Model(NamedTuple):
    """The functions of one network.

    Attributes:
        apply_fn: `(params, batch, *state) -> outputs` of a trained network.
        loss_fn: the mean loss that training adapts to.
        outer_loss_fn: the loss that scores the query in training; None for `loss_fn`.
        test_loss_fn: the loss that a test adapts to; None for `loss_fn`.
        metric_fn: `(adapted, query, *state) -> ` accuracy or mean squared error.
        features_fn: `(params, batch) -> [num_examples, num_features]`; None with a state.
        has_state: whether the functions carry statistics.
        refresh_state: whether the statistics are computed anew before the query is scored.
    """

    apply_fn: Callable[..., Array]
    loss_fn: LossFn
    outer_loss_fn: LossFn | None
    test_loss_fn: LossFn | None
    metric_fn: Callable[..., Array]
    features_fn: Callable[..., Array] | None
    has_state: bool
    refresh_state: bool


class Network(NamedTuple):
    """A model, its initial parameters and its initial statistics."""

    model: Model
    params: Params
    state: State


def build(
    preset: Preset, input_shape: tuple[int, ...], key: Array, *, served_way: int | None = None
) -> Network:
    """Returns the network of a preset with initial parameters.

    Args:
        preset: the settings.
        input_shape: the shape of one example.
        key: the PRNG key of the initial parameters.
        served_way: the number of outputs of the head that are used; defaults to all of them.

    Raises:
        ValueError: the head has fewer outputs than `served_way`.
    """
    served: Callable[..., Any] = lambda fn: fn
    if served_way is not None:
        if served_way > preset.way:
            raise ValueError(f"served_way must be at most way={preset.way}; got {served_way}")
        carries = preset.norm in CARRIES_STATE
        served = lambda fn: nn.first_ways(fn, served_way, has_state=carries)
    module = _module(preset, input_shape, key)
    make = _with_state if preset.norm in CARRIES_STATE else _without_state
    return make(preset, module, served)


def _without_state(preset: Preset, module: Any, served: Callable[..., Any]) -> Network:
    dtype, make_loss = _dtype_and_loss(preset)
    features_fn, params, state = nn.from_nnx(module, _features, compute_dtype=dtype)
    features_fn = _unconditioned(features_fn)
    apply_fn = served(_conditioned(features_fn))
    loss_fn = make_loss(apply_fn)
    metric_fn = loss_fn if preset.is_regression else _accuracy(apply_fn)
    model = Model(apply_fn, loss_fn, None, None, metric_fn, features_fn, False, False)
    return Network(model, params, state)


def _with_state(preset: Preset, module: Any, served: Callable[..., Any]) -> Network:
    """Returns a network that adapts in training mode and is tested in evaluation mode."""
    dtype, make_loss = _dtype_and_loss(preset)
    trained, params, state = nn.from_nnx(module, compute_dtype=dtype)
    module.eval()
    tested = served(nn.from_nnx(module, compute_dtype=dtype)[0])
    tested_loss = make_loss(tested, has_state=True)
    is_inductive = preset.norm == "inductive"
    outputs = lambda params, batch, state: tested(params, batch, state)[0]
    mean_loss = lambda params, batch, state: tested_loss(params, batch, state)[0]
    model = Model(
        apply_fn=outputs,
        loss_fn=make_loss(served(trained), has_state=True),
        outer_loss_fn=tested_loss if is_inductive else None,
        test_loss_fn=None if is_inductive else tested_loss,
        metric_fn=mean_loss if preset.is_regression else _accuracy(outputs),
        features_fn=None,
        has_state=True,
        refresh_state=is_inductive,
    )
    return Network(model, params, state)


def _dtype_and_loss(preset: Preset) -> tuple[str | None, Callable[..., Any]]:
    """Returns the dtype of the computation (None for float32) and the constructor of the loss."""
    dtype = None if preset.compute_dtype == "float32" else preset.compute_dtype
    return dtype, nn.mean_squared_error if preset.is_regression else nn.cross_entropy


def add_context(params: Params, key: Array) -> Params:
    """Returns parameters with those of CAVIA's conditioning: features * (1 + scale) + shift.

    Scale and shift are a linear function of `NUM_CONTEXT` context parameters, which start at zero.
    """
    num_features = params["head"]["kernel"].shape[0]
    film = nnx.initializers.lecun_normal()(key, (NUM_CONTEXT, 2 * num_features))
    return {**params, "context": jnp.zeros(NUM_CONTEXT), "film": film}


def _unconditioned(features_fn: Callable[..., Array]) -> Callable[..., Array]:
    """Returns features before conditioning, for parameters with or without a context."""

    def of_network(params: Params, batch: Any) -> Array:
        bare = {name: part for name, part in params.items() if name not in ("context", "film")}
        return features_fn(bare, batch)

    return of_network


def _conditioned(features_fn: Callable[..., Array]) -> Callable[..., Array]:
    """Returns a network whose features are conditioned if the parameters have a context."""

    def apply_fn(params: Params, batch: Any) -> Array:
        features = features_fn(params, batch)
        if "context" in params:
            scale, shift = jnp.split(params["context"] @ params["film"], 2)
            features = features * (1 + scale)[None] + shift[None]
        return features @ params["head"]["kernel"] + params["head"]["bias"][None]

    return apply_fn


def _accuracy(apply_fn: Callable[..., Array]) -> Callable[..., Array]:
    def accuracy(adapted: Params, query: Any, *state: State) -> Array:
        return metrics.accuracy(apply_fn(adapted, query, *state), query["targets"])

    return accuracy


def _features(module: Any, batch: Any) -> Array:
    return module.features(batch["inputs"], batch.get("weights"))


def _module(preset: Preset, input_shape: tuple[int, ...], key: Array) -> Any:
    head_init = jax.nn.initializers.normal(preset.head_scale)
    if preset.head_scale == 0:
        head_init = jax.nn.initializers.zeros
    shared: dict[str, Any] = {
        "norm": preset.norm,
        "norm_scale": preset.norm_scale,
        "num_steps": preset.num_inner_steps if preset.norm == "per_step" else None,
        "per_step_weights": preset.per_step_weights,
        "head_init": head_init,
        "rngs": nnx.Rngs(key),
    }
    if preset.model == "mlp":
        return nn.MLP(math.prod(input_shape), preset.way, hidden=preset.hidden_sizes, **shared)
    if preset.model == "resnet12":
        filters = tuple(preset.num_filters * factor for factor in (1, 2, 4, 8))
        return nn.ResNet12(preset.way, image_shape=input_shape, num_filters=filters, **shared)
    conv = {"image_shape": input_shape, "num_filters": preset.num_filters, "pooled": preset.pooled}
    return nn.Conv4(preset.way, **conv, **shared)
