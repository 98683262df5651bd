"""The network of a preset as pure functions: its outputs, losses, metric and features."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmaml import nn, rl
from jaxmaml.experiments.presets import Preset
from jaxmaml.nn import StatefulModel
from jaxmaml.types import (
    Array,
    AtStep,
    Batch,
    LossFn,
    MetricFn,
    ModelFn,
    Params,
    PlainFn,
    State,
    as_stateful,
    in_form_of,
)

CARRIES_STATE = ("inductive", "running", "per_step")
"""The normalizations that carry statistics."""
NUM_CONTEXT = 100
"""Context parameters of CAVIA's network, as in its paper (miniImageNet)."""


class Model(NamedTuple):
    """The functions of one network.

    They are plain, `(params, batch) -> output`, or all but `features_fn` carry the statistics of the
    normalization and are marked by `jaxmaml.types.with_state`.

    Attributes:
        apply_fn: the outputs of a trained network.
        loss_fn: the mean loss that training adapts to.
        query_loss_fn: the loss that scores the query in training; None for `loss_fn`.
        test_loss_fn: the loss that a test adapts to; None for `loss_fn`.
        metric_fn: accuracy or mean squared error of a trained network.
        score_fn: `(outputs, batch) -> score`, the same metric of the outputs of `apply_fn`; None for a
            policy, whose score is not one of outputs.
        features_fn: `(params, batch) -> [num_examples, num_features]`; None with statistics.
        refresh_state: whether the statistics are computed anew before the query is scored.
        problem: what a policy is trained for; None for networks of examples.
        at_step: what an inner step samples; None for networks of examples.
    """

    apply_fn: ModelFn
    loss_fn: LossFn
    query_loss_fn: LossFn | None
    test_loss_fn: LossFn | None
    metric_fn: MetricFn
    score_fn: PlainFn | None
    features_fn: PlainFn | None
    refresh_state: bool
    problem: rl.Problem | None = None
    at_step: AtStep | None = None


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
    make = _with_state if preset.norm in CARRIES_STATE else _without_state
    return make(preset, _module(preset, input_shape, key), _serving(preset, served_way))


def with_support_statistics(
    preset: Preset, input_shape: tuple[int, ...], *, served_way: int | None = None
) -> StatefulModel:
    """Returns the network of a transductive preset, with statistics that are stored.

    The parameters are those of `build`, a context included. `train_fn` stores the statistics of its
    batch, and `test_fn` normalizes with the stored ones: a query does not depend on other queries.

    Args:
        preset, input_shape, served_way: see `build`.
    """
    storing = dataclasses.replace(preset, norm="inductive")
    module, served = _module(storing, input_shape, jax.random.key(0)), _serving(preset, served_way)
    parts = nn.from_nnx_with_state(module, _features, compute_dtype=_dtype(preset))
    train, test = (
        served(_conditioned(_unconditioned(fn))) for fn in (parts.train_fn, parts.test_fn)
    )
    return parts._replace(train_fn=train, test_fn=test)


def _serving(preset: Preset, served_way: int | None) -> Callable[[ModelFn], ModelFn]:
    """Returns what cuts the outputs of a network to the first `served_way`, or leaves them."""
    if served_way is None:
        return lambda fn: fn
    if served_way > preset.way:
        raise ValueError(f"served_way must be at most way={preset.way}; got {served_way}")
    return lambda fn: nn.first_ways(fn, served_way)


def _without_state(
    preset: Preset, module: nnx.Module, served: Callable[[ModelFn], ModelFn]
) -> Network:
    """Returns a network that is the same in training and in a test."""
    features_fn, params = nn.from_nnx(module, _features, compute_dtype=_dtype(preset))
    features_fn = _unconditioned(features_fn)
    apply_fn = served(_conditioned(features_fn))
    loss_fn = _loss(preset, apply_fn)
    metric_fn = loss_fn if preset.is_regression else nn.accuracy(apply_fn)
    score_fn = _score_fn(preset)
    model = Model(apply_fn, loss_fn, None, None, metric_fn, score_fn, features_fn, False)
    return Network(model, params, ())


def _with_state(
    preset: Preset, module: nnx.Module, served: Callable[[ModelFn], ModelFn]
) -> Network:
    """Returns a network that adapts in training mode and is tested in evaluation mode."""
    parts = nn.from_nnx_with_state(module, compute_dtype=_dtype(preset))
    tested = served(parts.test_fn)
    tested_loss = _loss(preset, tested)
    is_inductive = preset.norm == "inductive"
    model = Model(
        apply_fn=tested,
        loss_fn=_loss(preset, served(parts.train_fn)),
        query_loss_fn=tested_loss if is_inductive else None,
        test_loss_fn=None if is_inductive else tested_loss,
        metric_fn=tested_loss if preset.is_regression else nn.accuracy(tested),
        score_fn=_score_fn(preset),
        features_fn=None,
        refresh_state=is_inductive,
    )
    return Network(model, parts.params, parts.state)


def _outputs(outputs: Array, batch: Batch) -> Array:
    """Is the model whose parameters are its outputs."""
    return outputs


# One object each, so that the program that scores them is compiled once.
_ERROR_OF_OUTPUTS, _ACCURACY_OF_OUTPUTS = nn.mean_squared_error(_outputs), nn.accuracy(_outputs)


def _score_fn(preset: Preset) -> PlainFn:
    return _ERROR_OF_OUTPUTS if preset.is_regression else _ACCURACY_OF_OUTPUTS


def _dtype(preset: Preset) -> str | None:
    """Returns the dtype of the computation as `jaxmaml.nn` takes it."""
    return None if preset.compute_dtype == "float32" else preset.compute_dtype


def _loss(preset: Preset, apply_fn: ModelFn) -> LossFn:
    return (nn.mean_squared_error if preset.is_regression else nn.cross_entropy)(apply_fn)


def add_context(params: Params, key: Array) -> Params:
    """Returns parameters with those of CAVIA's conditioning: features * (1 + scale) + shift.

    Scale and shift are a linear function of `NUM_CONTEXT` context parameters, which start at zero.
    """
    num_features = params["head"]["kernel"].shape[0]
    film = nnx.initializers.lecun_normal()(key, (NUM_CONTEXT, 2 * num_features))
    return {**params, "context": jnp.zeros(NUM_CONTEXT), "film": film}


def _unconditioned(features_fn: ModelFn) -> ModelFn:
    """Returns features before conditioning, for parameters with or without a context."""
    model = as_stateful(features_fn)

    def unconditioned(params: Params, batch: Batch, state: State) -> tuple[Array, State]:
        bare = {name: part for name, part in params.items() if name not in ("context", "film")}
        return model(bare, batch, state)

    return in_form_of(features_fn, unconditioned)


def _conditioned(features_fn: ModelFn) -> ModelFn:
    """Returns a network whose features are conditioned if the parameters have a context."""
    model = as_stateful(features_fn)

    def apply_fn(params: Params, batch: Batch, state: State) -> tuple[Array, State]:
        features, state = model(params, batch, state)
        if "context" in params:
            scale, shift = jnp.split(params["context"] @ params["film"], 2)
            features = features * (1 + scale)[None] + shift[None]
        return features @ params["head"]["kernel"] + params["head"]["bias"][None], state

    return in_form_of(features_fn, apply_fn)


def _features(module: Any, batch: Batch) -> Array:
    return module.features(batch["inputs"], batch.get("weights"))


def _module(preset: Preset, input_shape: tuple[int, ...], key: Array) -> nnx.Module:
    """Returns the Flax module of a preset, with initial parameters."""
    # Options of every network.
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

    # The network itself.
    if preset.model == "mlp":
        return nn.MLP(math.prod(input_shape), preset.way, hidden=preset.hidden_sizes, **shared)
    if preset.model == "resnet12":
        filters = tuple(preset.num_filters * factor for factor in (1, 2, 4, 8))
        return nn.ResNet12(preset.way, image_shape=input_shape, num_filters=filters, **shared)
    conv = {"image_shape": input_shape, "num_filters": preset.num_filters, "pooled": preset.pooled}
    return nn.Conv4(preset.way, **conv, **shared)
