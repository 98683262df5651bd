"""Networks with channels first are computed with channels last, with the same result."""

import jax
import jax.numpy as jnp
import pytest
from cases import draw
from comparing import assert_leaves_close
from jax import lax

from jaxmaml import nn, rewriting


@jax.custom_jvp
def clipped(x, limit):
    return jnp.minimum(x, limit), limit


@clipped.defjvp
def _(primals, tangents):
    x, limit = primals
    return clipped(x, limit), (jnp.where(x < limit, tangents[0], 0.5 * tangents[1]), tangents[1])


def normalized(x):
    mean = x.mean((0, 2, 3), keepdims=True)
    return (x - mean) * lax.rsqrt(((x - mean) ** 2).mean((0, 2, 3), keepdims=True) + 0.1)


def group_norm(x):
    groups = x.reshape(x.shape[0], 2, -1)
    return (groups - groups.mean(-1, keepdims=True)).reshape(x.shape)


LAYERS = {
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "two arguments with one derivative": lambda x: clipped(x, jnp.full(x.shape, 0.3))[0],
    "an argument without axes": lambda x: clipped(x, jnp.asarray(0.3))[0],
    "relu twice in jit": jax.jit(lambda x: jax.nn.relu(1 - jax.nn.relu(x))),
    "a bias per channel": lambda x: x + jnp.arange(4.0).reshape(1, 4, 1, 1),
    "a scale per example": lambda x: x * jnp.arange(x.shape[0]).reshape(-1, 1, 1, 1),
    "batch normalization": normalized,
    "group normalization": group_norm,
    "softmax over channels": lambda x: jax.nn.softmax(x, axis=1),
    "maximum over space": lambda x: x - x.max((2, 3), keepdims=True),
    "padding": lambda x: jnp.pad(x, ((0, 0), (0, 0), (1, 2), (0, 1)), constant_values=2),
    "a crop": lambda x: x[:, :, 1:-1, ::2],
    "a reversed axis": lambda x: x[:, :, ::-1],
    "concatenation": lambda x: jnp.concatenate([x[:, :2], 1 - x, x[:, 1:3]], axis=1)[:, 2:6],
    "shuffled channels": lambda x: x.reshape(-1, 2, 2, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape),
    "a transposition": lambda x: jax.nn.relu(x.transpose(0, 1, 3, 2)),
    "an axis of size one": lambda x: jnp.squeeze(jnp.expand_dims(x, 1) * 2, 1),
    "one channel": lambda x: x[:, :1] * jnp.ones((1, 4, 1, 1)),
    "max-pooling": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "SAME"
    ),
    "a scan": lambda x: lax.scan(lambda c, row: (c + row, c), jnp.zeros(x.shape[1:]), x)[1],
    "a condition": lambda x: lax.cond(x.sum() > 0, jax.nn.relu, jnp.sin, x),
    "checkpoint": jax.checkpoint(jax.nn.relu),
    "reshaped in another order": lambda x: (
        jnp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]), order="F").reshape(x.shape)
    ),
    "reshaped in another order and to the same sizes": lambda x: jnp.reshape(x, x.shape, order="F"),
    "an integer": lambda x: x * (x > 0).astype(jnp.int32),
}  # fmt: skip


def network(layer, kernels, images):
    for kernel in kernels:
        images = layer(lax.conv(images, kernel, (1, 1), "SAME"))
    return images


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_layer_between_convolutions_and_its_derivatives_are_the_same(x64, layer):
    args = ((draw(0, 4, 2, 3, 3), draw(1, 4, 4, 3, 3)), draw(2, 3, 2, 6, 5))
    model = lambda kernels, images: network(layer, kernels, images)

    def derivatives(model):
        loss = lambda *args: jnp.sin(model(*args)).sum()
        grads, second = jax.jvp(jax.grad(loss, (0, 1)), args, args)
        return model(*args), grads, second

    assert_leaves_close(derivatives(nn.fast_convolutions(model)), derivatives(model), rtol=1e-10)


@pytest.mark.parametrize("layer", ["relu", "batch normalization", "an axis of size one"])
def test_images_are_not_transposed_between_convolutions(layer):
    kernels, images = [jnp.ones((4, 4, 3, 3))] * 3, jnp.ones((2, 4, 6, 6))
    model = nn.fast_convolutions(lambda images: network(LAYERS[layer], kernels, images))
    jaxpr = jax.make_jaxpr(model)(images)
    sources = [
        getattr(eqn.invars[0].aval, "shape", ())
        for eqn, _ in rewriting.operations(jaxpr.jaxpr)
        if eqn.primitive.name == "transpose"
    ]
    moved = [shape for shape in sources if 6 in shape]
    assert len(moved) == 2  # before the first and after the last
