import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import draw
from jax import lax

from jaxmaml import nn


def lax_conv(inputs, kernel, stride, padding):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        inputs, kernel, (stride, stride), padding, dimension_numbers=dimensions
    )


@pytest.mark.parametrize(
    ("size", "stride", "padding"),
    [
        ((3, 3), 1, "SAME"),
        ((3, 3), 2, "SAME"),
        ((3, 3), 2, "VALID"),
        ((3, 3), 3, "VALID"),
        ((1, 1), 2, "SAME"),
        ((2, 5), 1, "VALID"),
        ((2, 5), 2, "SAME"),
        ((2, 5), 3, "SAME"),
    ],
)
def test_conv_and_its_two_derivatives_equal_lax_conv(x64, size, stride, padding):
    inputs, kernel = draw(0, 2, 8, 7, 3), draw(1, *size, 3, 4)
    tangents = draw(2, *inputs.shape), draw(3, *kernel.shape)

    def derivatives(convolve):
        def loss(inputs, kernel):
            return jnp.sin(convolve(inputs, kernel)).sum()

        grads, second = jax.jvp(jax.grad(loss, (0, 1)), (inputs, kernel), tangents)
        return convolve(inputs, kernel), grads, second

    @jax.jit
    def both():
        ours = derivatives(lambda x, k: nn.conv(x, k, stride=stride, padding=padding))
        return ours, derivatives(lambda x, k: lax_conv(x, k, stride, padding))

    ours, theirs = both()
    for mine, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.dtype == jnp.float64
        np.testing.assert_allclose(mine, expected, rtol=1e-11, atol=1e-11)


def test_per_task_gradient_contains_no_convolution():
    inputs, kernels = draw(0, 3, 2, 8, 8, 1), draw(1, 3, 3, 3, 1, 4)

    def loss(kernel, inputs):
        return (nn.conv(inputs, kernel, stride=2) ** 2).sum()

    grad = jax.vmap(jax.grad(loss))
    assert "conv_general" not in str(jax.make_jaxpr(grad)(kernels, inputs))
    one = jax.jit(jax.grad(loss))
    expected = [one(k, x) for k, x in zip(kernels, inputs, strict=True)]
    np.testing.assert_allclose(
        jax.jit(grad)(kernels, inputs), jnp.stack(expected), rtol=1e-5, atol=1e-5
    )


def test_conv_takes_leading_axes():
    inputs, kernel = draw(0, 3, 2, 6, 6, 2), draw(1, 3, 3, 2, 4)
    convolve = jax.jit(nn.conv)
    folded = convolve(inputs.reshape(6, 6, 6, 2), kernel)
    np.testing.assert_allclose(
        convolve(inputs, kernel), folded.reshape(3, 2, 6, 6, 4), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(convolve(inputs[0, 0], kernel), folded[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "kernel", "expected"),
    [
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.float32, jnp.float32),
        (jnp.uint8, jnp.float32, jnp.float32),
        (jnp.float32, jnp.float64, jnp.float64),
    ],
)
def test_conv_dtype_is_the_promoted_one(x64, inputs, kernel, expected):
    outputs = jax.jit(nn.conv)(jnp.ones((1, 4, 4, 1), inputs), jnp.ones((3, 3, 1, 2), kernel))
    assert outputs.dtype == expected
    assert outputs[0, 1, 1, 0] == 9


@pytest.mark.parametrize(
    ("shape", "kernel", "options", "named"),
    [
        ((1, 4, 4, 1), (3, 3, 1), {}, "kernel"),
        ((1, 4, 4, 2), (3, 3, 1, 4), {}, "inputs"),
        ((4, 1), (3, 3, 1, 4), {}, "inputs"),
        ((1, 4, 4, 1), (3, 3, 1, 4), {"stride": 0}, "stride"),
        ((1, 4, 4, 1), (3, 3, 1, 4), {"padding": "FULL"}, "padding must be one of SAME, VALID"),
        ((1, 2, 4, 1), (3, 3, 1, 4), {"padding": "VALID"}, "at least as large"),
    ],
)
def test_conv_names_what_is_wrong(shape, kernel, options, named):
    with pytest.raises(ValueError, match=named):
        nn.conv(jnp.ones(shape), jnp.ones(kernel), **options)
