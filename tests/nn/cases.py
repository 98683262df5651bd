"""Data, tasks, meta-gradients and models that several test modules of this folder share."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
from comparing import assert_leaves_close
from flax import linen, nnx
from jax import lax

import jaxmaml
from jaxmaml import nn


def draw(seed, *shape):
    """Returns standard normal numbers, in float64 if that is enabled."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def jitter(params):
    """Returns parameters without zero biases and unit scales, which would hide a missing term."""
    leaves, treedef = jax.tree.flatten(params)
    moved = [leaf + 0.1 * draw(i, *leaf.shape).astype(leaf.dtype) for i, leaf in enumerate(leaves)]
    return treedef.unflatten(moved)


def is_finite(tree):
    return all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def is_plain(tree):
    """Returns whether a pytree consists of nested dicts of arrays only."""
    if isinstance(tree, jax.Array):
        return True
    return type(tree) is dict and all(is_plain(value) for value in tree.values())


def classified(*shape, way=3, shot=2, seed=1, **extra):
    """Returns a task with inputs of a shape, and as many query as support examples."""
    targets = jnp.repeat(jnp.arange(way), shot)
    batch = lambda seed: {"inputs": draw(seed, way * shot, *shape), "targets": targets, **extra}
    return jaxmaml.Task(support=batch(seed), query=batch(seed + 1))


def stacked(*tasks):
    """Returns tasks with a leading task axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)


def meta_gradient(loss_fn, params, task, *, state=(), num_inner_steps=2, **options):
    """Returns (gradient, info) of MAML with an inner rate of 0.1."""
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), num_inner_steps, **options)
    grad = jax.jit(jax.grad(learner.loss, has_aux=True))
    return grad(params, task, state=state)


def assert_adjoints_agree(loss_fn, params, task, **options):
    """Compares the two exact modes, whose gradient must not be zero; returns (gradient, info)."""
    (ours, info), (plain, _) = (
        meta_gradient(loss_fn, params, task, adjoint=jaxmaml.Exact(mode=mode), **options)
        for mode in ("forward_over_reverse", "reverse")
    )
    assert max(abs(leaf).max() for leaf in jax.tree.leaves(plain)) > 1e-6
    assert_leaves_close(ours, plain, rtol=1e-10, atol=1e-10)
    return ours, info


# The layers of the built-in image networks in plain JAX.


def plain_norm(x):
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    return (x - mean) / jnp.sqrt(var + 0.001)


def plain_conv(layer, x, stride=1):
    dimensions = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    x = lax.conv_general_dilated(x, layer["kernel"], strides, "SAME", dimension_numbers=dimensions)
    return x + layer.get("bias", 0)


def plain_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def assert_network_is(module, plain_features):
    """Compares outputs and gradients with plain features and a linear head, images of 20 x 17 x 2."""
    apply_fn, params = nn.from_nnx(module)
    params, inputs, target = jitter(params), draw(1, 10, 20, 17, 2), draw(2, 10, 5)

    def plain_network(params):
        head = params["head"]
        return plain_features(params, inputs) @ head["kernel"] + head["bias"]

    @jax.jit
    def outputs_and_gradients(params):
        def projected(network):
            def loss(params):
                outputs = network(params)
                return (outputs * target).sum(), outputs

            return jax.grad(loss, has_aux=True)(params)

        return projected(lambda p: apply_fn(p, {"inputs": inputs})), projected(plain_network)

    (grads, ours), (plain_grads, plain) = outputs_and_gradients(params)
    assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours, plain, rtol=1e-11, atol=1e-11)
    assert_leaves_close(grads, plain_grads, rtol=1e-8, atol=1e-9)


def paper_conv4(pooled, **options):
    return nn.Conv4(
        5,
        image_shape=(20, 17, 2),
        num_filters=6,
        pooled=pooled,
        head_init=nnx.initializers.normal(1.0),
        norm_scale=False,
        rngs=nnx.Rngs(0),
        **options,
    )


def small_resnet12(dtype, *, num_filters=(3, 6), **options):
    return nn.ResNet12(
        5, image_shape=(20, 17, 2), num_filters=num_filters, param_dtype=dtype,
        rngs=nnx.Rngs(0), **options,
    )  # fmt: skip


NETWORKS = {
    "conv4": lambda dtype: nn.Conv4(
        5, image_shape=(20, 17, 2), num_filters=6, param_dtype=dtype, rngs=nnx.Rngs(0)
    ),
    "conv4-pooled": lambda dtype: paper_conv4(True, param_dtype=dtype, conv_bias=True),
    "mlp": lambda dtype: nn.MLP(680, 5, param_dtype=dtype, rngs=nnx.Rngs(0)),
    "mlp-norm": lambda dtype: nn.MLP(
        680, 5, norm="transductive", param_dtype=dtype, rngs=nnx.Rngs(0)
    ),
    "mlp-group": lambda dtype: nn.MLP(680, 5, norm="group", param_dtype=dtype, rngs=nnx.Rngs(0)),
    "resnet12": small_resnet12,
    "resnet12-layer": lambda dtype: small_resnet12(dtype, norm="layer"),
}
"""Built-in networks by name: `(dtype)` to a module for images of 20 x 17 x 2 and 5 outputs."""


# One network in four libraries: batch normalization of 4 numbers, whose averages have momentum 0.5,
# then a linear layer with 3 outputs.


class NormedNNX(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=nnx.Rngs(0))
        self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(1))

    def __call__(self, inputs):
        return self.linear(self.norm(inputs))


class NormedLinen(linen.Module):
    @linen.compact
    def __call__(self, inputs, is_training):
        normed = linen.BatchNorm(use_running_average=not is_training, momentum=0.5)(inputs)
        return linen.Dense(3)(normed)


class NormedEquinox(eqx.Module):
    norm: eqx.nn.BatchNorm
    linear: eqx.nn.Linear

    def __init__(self):
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", momentum=0.5, mode="batch")
        self.linear = eqx.nn.Linear(4, 3, key=jax.random.key(0))

    def __call__(self, inputs, state):
        outputs, state = self.norm(inputs, state)
        return self.linear(outputs), state


def normed_haiku(inputs, is_training):
    return hk.Linear(3)(hk.BatchNorm(True, True, 0.5)(inputs, is_training))


def in_training(model, batch):
    return model(batch["inputs"], is_training=True)


def in_evaluation(model, batch):
    return model(batch["inputs"], is_training=False)


def _linen():
    module = NormedLinen()
    return module, module.init(jax.random.key(0), jnp.ones((2, 4)), True)


def _haiku():
    transformed = hk.transform_with_state(normed_haiku)
    return transformed, *transformed.init(jax.random.key(0), jnp.ones((2, 4)), True)


def _with_state() -> dict[str, Callable[..., nn.StatefulModel]]:
    modes = (in_training, in_evaluation)
    return {
        "nnx": lambda **options: nn.from_nnx_with_state(NormedNNX(), **options),
        "linen": lambda **options: nn.from_linen_with_state(*_linen(), *modes, **options),
        "equinox": lambda **options: nn.from_equinox_with_state(
            *eqx.nn.make_with_state(NormedEquinox)(), **options
        ),
        "haiku": lambda **options: nn.from_haiku_with_state(*_haiku(), *modes, **options),
    }


WITH_STATE = _with_state()
"""By library: `(**options)` to the network above as a `StatefulModel`."""

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "nnx": (
        lambda: nn.from_nnx(NormedNNX()),
        ValueError,
        "from_nnx takes models without state, .* norm/mean, norm/var; use from_nnx_with_state",
    ),
    "linen": (
        lambda: nn.from_linen(*_linen(), in_training),
        ValueError,
        "batch_stats/BatchNorm_0/mean, .*; use from_linen_with_state",
    ),
    "equinox": (
        lambda: nn.from_equinox(eqx.nn.make_with_state(NormedEquinox)()[0]),
        ValueError,
        "norm/batch_counter, norm/batch_state_index; use from_equinox_with_state",
    ),
    "haiku": (
        lambda: nn.from_haiku(*_haiku()[:2]),
        TypeError,
        "hk.transform_with_state carries the state that its init returns; use from_haiku_with_state",
    ),
}
"""By library: the same network given to the adapter for models without state, and its error."""
