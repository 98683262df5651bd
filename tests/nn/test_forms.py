"""Models of four libraries compute the same with their convolutions replaced, derivatives included."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import draw
from comparing import assert_leaves_close
from flax import linen, nnx
from jax import lax

from jaxmaml import nn, types
from jaxmaml.nn import forms

# A residual network in Equinox, a U-Net in Linen, a 1-D network in Haiku and a ResNet in NNX.


class EquinoxResNet(eqx.Module):
    stem: eqx.nn.Conv2d
    body: tuple[eqx.nn.Conv2d, eqx.nn.Conv2d]
    norm: eqx.nn.GroupNorm
    head: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 4)
        self.stem = eqx.nn.Conv2d(2, 4, 3, stride=2, padding=1, key=keys[0])
        self.body = (
            eqx.nn.Conv2d(4, 4, 3, padding=1, groups=2, key=keys[1]),
            eqx.nn.Conv2d(4, 4, 3, padding=2, dilation=2, key=keys[2]),
        )
        self.norm = eqx.nn.GroupNorm(2, 4)
        self.head = eqx.nn.Linear(4, 3, key=keys[3])

    def __call__(self, image):
        image = self.stem(image.transpose(2, 0, 1))
        for conv in self.body:
            image = image + jax.nn.relu(self.norm(conv(image)))
        return self.head(eqx.nn.MaxPool2d(2, 2)(image).mean((1, 2)))


class LinenUNet(linen.Module):
    @linen.compact
    def __call__(self, images):
        down = jax.nn.relu(linen.Conv(4, (3, 3))(images))
        low = linen.max_pool(down, (2, 2), strides=(2, 2))
        low = jax.nn.relu(linen.remat(linen.Conv)(4, (3, 3), feature_group_count=4)(low))
        up = linen.ConvTranspose(4, (3, 3), strides=(2, 2))(low)
        return linen.Conv(1, (1, 1))(jnp.concatenate([down, up], axis=-1)).mean((1, 2))


def haiku_sequence_network(inputs):
    inputs = inputs.reshape(inputs.shape[0], -1, 2)
    for rate in (1, 2):
        inputs = jax.nn.relu(hk.Conv1D(4, 3, rate=rate)(inputs))
        inputs = hk.max_pool(inputs, (1, 2, 1), (1, 2, 1), "SAME")
    return hk.Linear(3)(inputs.mean(1))


class NNXResNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Conv(2, 4, (7, 7), strides=2, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, images):
        images = nnx.max_pool(
            jax.nn.relu(self.norm(self.stem(images))), (3, 3), strides=(2, 2), padding="SAME"
        )
        return self.head((images + self.conv(images)).mean((1, 2)))


def _linen():
    module = LinenUNet()
    return nn.from_linen(module, module.init(jax.random.key(0), jnp.ones((2, 8, 8, 2))))


def _haiku():
    transformed = hk.transform(haiku_sequence_network)
    params = transformed.init(jax.random.key(0), jnp.ones((2, 8, 8, 2)))
    return nn.from_haiku(transformed, params)


def _nnx():
    model = nn.from_nnx_with_state(NNXResNet())

    def apply_fn(params, batch):
        state = _cast(model.state, jnp.promote_types(batch["inputs"].dtype, jnp.float32))
        return model.train_fn(params, batch, state)[0]

    return apply_fn, model.params


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "an Equinox residual network": lambda: nn.from_equinox(EquinoxResNet()),
    "a Linen U-Net": _linen,
    "a Haiku network of sequences": _haiku,
    "an NNX ResNet": _nnx,
}
REPLACED = {
    "an Equinox residual network": (3, 1, 0),
    "a Linen U-Net": (4, 1, 0),
    "a Haiku network of sequences": (2, 2, 0),
    "an NNX ResNet": (2, 0, 1),  # its pooled windows overlap
}
"""The numbers of convolutions and max-poolings that are replaced, and of those that are left."""
INPUTS = (3, 8, 8, 2)


def _cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@pytest.mark.parametrize(
    "name",
    [
        *list(MODELS)[:2],
        *(pytest.param(name, marks=pytest.mark.slow) for name in list(MODELS)[2:]),
    ],
)
def test_a_model_and_its_derivatives_are_the_same(x64, name):
    apply_fn, params = MODELS[name]()
    params = _cast(params, jnp.float64)
    batch = {"inputs": draw(0, 2, *INPUTS)}
    stacked = jax.tree.map(lambda leaf: leaf + 0.1 * draw(leaf.size, 2, *leaf.shape), params)
    tangents = jax.tree.map(lambda leaf: draw(leaf.size + 1, *leaf.shape), stacked)

    def derivatives(apply_fn):
        def loss(params, batch):
            return jnp.sin(apply_fn(params, batch)).sum()

        grad = jax.vmap(jax.grad(loss, (0, 1)))
        outputs = jax.vmap(apply_fn)(stacked, batch)
        return outputs, jax.jvp(lambda params: grad(params, batch), (stacked,), (tangents,))

    mine, theirs = jax.jit(
        lambda: (derivatives(nn.fast_convolutions(apply_fn)), derivatives(apply_fn))
    )()
    assert_leaves_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_replaced_is_listed_and_gone(name):
    apply_fn, params = MODELS[name]()
    batch = {"inputs": jnp.ones(INPUTS)}
    found = nn.convolutions_of(apply_fn, params, batch)
    counted = tuple(
        sum(conv.kind == kind and conv.replaced for conv in found)
        for kind in ("convolution", "max-pooling")
    )
    assert (*counted, sum(not conv.replaced for conv in found)) == REPLACED[name]
    left = nn.convolutions_of(nn.fast_convolutions(apply_fn), params, batch)
    assert [conv.reason for conv in left] == ["its windows overlap or have gaps"] * REPLACED[name][
        2
    ]


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_stays_and_agrees(name):
    apply_fn, params = MODELS[name]()
    batch = {"inputs": draw(0, *INPUTS)}
    exact = jax.jit(apply_fn)(params, batch)
    params, batch = _cast((params, batch), jnp.bfloat16)
    fast = jax.jit(nn.fast_convolutions(apply_fn))(params, batch)
    assert fast.dtype == jax.eval_shape(apply_fn, params, batch).dtype
    np.testing.assert_allclose(fast.astype(jnp.float32), exact, atol=0.05 * np.abs(exact).max())


def _conv(inputs, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(inputs, kernel, (1, 1), "SAME", dimension_numbers=numbers)


IMAGES, KERNEL = draw(0, 2, 6, 6, 3), draw(1, 3, 3, 3, 3)
CUSTOM = jax.custom_vjp(_conv)
CUSTOM.defvjp(lambda x, k: (_conv(x, k), (x, k)), lambda kept, cotangent: (cotangent, kept[1]))
PLACES = {
    "a scan": lambda x, k: lax.scan(lambda x, _: (_conv(x, k), None), x, length=2)[0],
    "a loop": lambda x, k: lax.fori_loop(0, 2, lambda _, x: _conv(x, k), x),
    "a condition": lambda x, k: lax.cond(x.sum() > 0, lambda: _conv(x, k), lambda: x),
    "jit": jax.jit(_conv),
    "checkpoint": jax.checkpoint(_conv),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_convolution_is_replaced_inside_of(place):
    function = PLACES[place]
    fast = nn.fast_convolutions(function)
    np.testing.assert_allclose(fast(IMAGES, KERNEL), function(IMAGES, KERNEL), rtol=1e-4, atol=1e-4)
    assert "conv_general" not in str(jax.make_jaxpr(fast)(IMAGES, KERNEL))


def test_a_custom_derivative_is_left_as_it_is_and_listed():
    fast = nn.fast_convolutions(CUSTOM)
    grads = jax.grad(lambda x, k: fast(x, k).sum(), (0, 1))(IMAGES, KERNEL)
    np.testing.assert_array_equal(grads[0], jnp.ones_like(IMAGES))
    np.testing.assert_array_equal(grads[1], KERNEL)
    (found,) = nn.convolutions_of(CUSTOM, IMAGES, KERNEL)
    assert found == nn.Convolution(
        "convolution", IMAGES.shape, KERNEL.shape, IMAGES.shape, jnp.float32, False,
        "it is inside custom_vjp_call, which is left as it is",
    )  # fmt: skip


def test_another_backend_keeps_its_own_form(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "conv_general" in str(jax.make_jaxpr(nn.fast_convolutions(_conv))(IMAGES, KERNEL))
    (found,) = nn.convolutions_of(_conv, IMAGES, KERNEL)
    assert (found.replaced, found.reason) == (False, "the form of XLA is kept on a gpu")
    monkeypatch.setitem(forms.PATCHES_ARE_FASTER, "gpu", True)  # a measurement changes one entry
    assert nn.convolutions_of(_conv, IMAGES, KERNEL)[0].replaced


def test_a_kernel_with_very_many_entries_is_left():
    args = jnp.ones((1, 1, 300)), jnp.ones((1, 1, 200))
    convolve = functools.partial(lax.conv_general_dilated, window_strides=(1,), padding="SAME")
    (found,) = nn.convolutions_of(convolve, *args)
    assert found.reason == "its kernel has 200 entries per channel, more than 128"
    np.testing.assert_allclose(nn.fast_convolutions(convolve)(*args), convolve(*args), rtol=1e-5)


POOLINGS = {
    "one axis": ((1, 2, 1, 1), "VALID"),
    "channels first": ((1, 1, 2, 3), "SAME"),
    "every axis": ((2, 3, 2, 2), "SAME"),
}


@pytest.mark.parametrize("dtype", ["float32", "int32"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_max_poolings_of_other_axes(pooling, dtype):
    window, padding = POOLINGS[pooling]
    images = (5 * draw(0, 2, 7, 6, 3)).astype(dtype)
    function = functools.partial(
        lax.reduce_window,
        init_value=np.array(-np.inf if dtype == "float32" else np.iinfo(dtype).min, dtype),
        computation=lax.max, window_dimensions=window, window_strides=window, padding=padding,
    )  # fmt: skip
    assert nn.convolutions_of(function, images)[0].replaced
    np.testing.assert_array_equal(nn.fast_convolutions(function)(images), function(images))


def test_a_max_pooling_of_truth_values_is_left():
    function = lambda x: lax.reduce_window(x, False, lax.max, (1, 2), (1, 2), "VALID")
    mask = jnp.array([[True, False, False, False]])
    assert not nn.convolutions_of(function, mask)[0].replaced
    np.testing.assert_array_equal(nn.fast_convolutions(function)(mask), function(mask))


def test_a_marked_model_stays_marked_and_takes_keywords():
    model = nn.from_nnx_with_state(NNXResNet())
    fast = nn.fast_convolutions(model.train_fn)
    assert types.carries_state(fast)
    batch = {"inputs": draw(0, *INPUTS)}
    expected = jax.jit(model.train_fn)(model.params, batch, model.state)
    assert_leaves_close(jax.jit(fast)(model.params, batch, model.state), expected, rtol=1e-4)
    named = nn.fast_convolutions(_conv)
    np.testing.assert_allclose(
        named(IMAGES, kernel=KERNEL), _conv(IMAGES, KERNEL), rtol=1e-5, atol=1e-5
    )


def branching(inputs):
    return inputs if inputs.sum() > 0 else -inputs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nn.fast_convolutions(branching)(IMAGES), "JAX can trace, which branching is not"),
        (lambda: nn.convolutions_of(branching, IMAGES), "JAX can trace, which branching is not"),
        (lambda: nn.fast_convolutions(np.asarray)(IMAGES), "which asarray is not"),
        (lambda: nn.fast_convolutions(jnp.sin)("four"), "which sin is not"),
        (lambda: nn.fast_convolutions(3), "fast_convolutions takes a function; got int"),  # type: ignore[arg-type]
        (lambda: nn.convolutions_of(None), "convolutions_of takes a function; got NoneType"),  # type: ignore[arg-type]
    ],
)
def test_a_function_that_cannot_be_traced_is_refused_in_one_line(call, message):
    with pytest.raises(TypeError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MODELS)
def test_the_number_of_examples_may_be_unknown(name):
    apply_fn, params = MODELS[name]()
    (num,) = jax.export.symbolic_shape("num")
    inputs = jax.ShapeDtypeStruct((num, *INPUTS[1:]), jnp.float32)
    expected = jax.eval_shape(apply_fn, params, {"inputs": inputs})
    found = jax.eval_shape(nn.fast_convolutions(apply_fn), params, {"inputs": inputs})
    assert found == expected
