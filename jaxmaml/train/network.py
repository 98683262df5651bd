"""A preset's network as pure functions: what is adapted on, what scores, what a head is given."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmaml import metrics, nn
from jaxmaml.train.presets import Preset
from jaxmaml.types import Array, LossFn, Params, State

CARRIES_STATE = ("inductive", "running", "per_step")
"""The policies of normalisation that hand statistics on."""
NUM_CONTEXT = 100
"""Context parameters of CAVIA's conditional network, as in its paper's miniImageNet network."""


class Model(NamedTuple):
    """The functions of one network; equal ones compile once.

    Attributes:
        apply_fn: `(params, batch, *state) -> outputs` of a trained network, as scored and drawn.
        loss_fn: the mean loss adapted on in training.
        outer_loss_fn: what scores the query in training, None where that is `loss_fn`.
        test_loss_fn: the loss adapted on in a test, None where that is `loss_fn`.
        metric_fn: `(adapted, query, *state) -> ` accuracy or mean squared error.
        features_fn: `(params, batch) -> [num_examples, num_features]`, None with a state.
        has_state: whether the functions carry statistics.
        refresh_state: whether those are computed anew before the query is scored.
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
    """A model and what it starts from."""

    model: Model
    params: Params
    state: State


def build(
    preset: Preset, input_shape: tuple[int, ...], key: Array, *, served_way: int | None = None
) -> Network:
    """The preset's network with initial parameters.

    Args:
        preset: the settings.
        input_shape: of one example.
        key: of the initial parameters.
        served_way: the head's first so many outputs are used; None is all.

    Raises:
        ValueError: `served_way` is more than the head has.
    """
    served: Callable[..., Any] = lambda fn: fn
    if served_way is not None:
        check_served_way(served_way, preset.way)
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
    """The module in training mode adapts and collects statistics; in evaluation mode it is tested."""
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
    """What the network computes in, and the constructor of its loss."""
    dtype = None if preset.compute_dtype == "float32" else preset.compute_dtype
    return dtype, nn.mean_squared_error if preset.is_regression else nn.cross_entropy


def add_context(params: Params, key: Array) -> Params:
    """The parameters of a network that CAVIA conditions: features * (1 + scale) + shift.

    Scale and shift are a linear function of `NUM_CONTEXT` context parameters, which are zero.
    """
    num_features = params["head"]["kernel"].shape[0]
    film = nnx.initializers.lecun_normal()(key, (NUM_CONTEXT, 2 * num_features))
    return {**params, "context": jnp.zeros(NUM_CONTEXT), "film": film}


def _unconditioned(features_fn: Callable[..., Array]) -> Callable[..., Array]:
    """The features before a context scales and shifts them: with or without one in the parameters."""

    def of_network(params: Params, batch: Any) -> Array:
        bare = {name: part for name, part in params.items() if name not in ("context", "film")}
        return features_fn(bare, batch)

    return of_network


def _conditioned(features_fn: Callable[..., Array]) -> Callable[..., Array]:
    """The network whose features a context scales and shifts, where the parameters have one."""

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


def check_served_way(served_way: int, way: int) -> None:
    """Raises ValueError where a head of `way` outputs is asked for more of them."""
    if served_way > way:
        raise ValueError(
            f"way={served_way} is more than the {way} outputs of the head that was trained; only "
            "learners without a fixed head can (protonet, proto_maml, r2d2, unicorn)"
        )


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
