"""Every convolution of XLA as patches times a matrix, with its first and second derivatives."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import draw
from comparing import assert_leaves_close
from jax import lax

from jaxmaml.nn.general_conv import Window, conv_general


def ours(inputs, kernel, **options: Any):
    """`lax.conv_general_dilated` of the same arguments, in the form of this package."""
    function = functools.partial(lax.conv_general_dilated, **options)
    eqn = jax.make_jaxpr(function)(inputs, kernel).eqns[-1]
    assert eqn.primitive.name == "conv_general_dilated"
    return conv_general(inputs, kernel, **eqn.params)


def line(groups=1, batch_groups=1, channels=4, filters=6, **options):
    """A convolution of one dimension: (shape of inputs, shape of kernel, options)."""
    defaults = {"window_strides": (1,), "padding": [(0, 0)]}
    counts = {"feature_group_count": groups, "batch_group_count": batch_groups}
    return (2, channels, 9), (filters, channels // groups, 3), defaults | counts | options


def plane(layout="NHWC HWIO NHWC", **options):
    """A convolution of two dimensions in a layout."""
    sizes = {"N": 2, "C": 3, "H": 7, "W": 6}
    taps = {"O": 4, "I": 3, "H": 3, "W": 2}
    names = layout.split()
    shapes = tuple(sizes[name] for name in names[0]), tuple(taps[name] for name in names[1])
    defaults = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": tuple(names)}
    return *shapes, defaults | options


CASES = {
    "strides": line(window_strides=(2,), padding=[(1, 2)]),
    "cropped": line(padding=[(-1, -1)], rhs_dilation=(2,)),
    "groups": line(groups=2),
    "depthwise": line(groups=4, filters=8, padding=[(1, 1)]),
    "depthwise, dilated inputs": line(groups=4, filters=4, lhs_dilation=(2,)),
    "batch groups": line(batch_groups=2),
    "transposed": line(padding=[(1, 0)], lhs_dilation=(2,)),
    "transposed, dilated": line(padding=[(3, 2)], lhs_dilation=(3,), rhs_dilation=(2,)),
    "transposed, groups": line(groups=2, padding=[(2, 1)], lhs_dilation=(2,)),
    "transposed, phases without taps": line(padding=[(2, 1)], lhs_dilation=(4,)),
    "transposed, one phase": line(padding=[(4, 4)], lhs_dilation=(2,), rhs_dilation=(4,)),
    "transposed, cropped": line(padding=[(-2, 5)], lhs_dilation=(2,)),
    "transposed, with strides": line(
        padding=[(2, 2)], window_strides=(2,), lhs_dilation=(3,)
    ),
    "plane": plane(window_strides=(1, 2)),
    "plane, channels first": plane("NCHW OIHW NCHW", rhs_dilation=(1, 3)),
    "plane, odd layouts": plane("HWNC OHIW CNHW", lhs_dilation=(2, 1), padding=[(1, 1), (2, 0)]),
    "plane, transposed": plane(lhs_dilation=(2, 3), padding=[(1, 2), (2, 1)]),
    "volume": (
        (2, 4, 5, 4, 2),
        (2, 3, 1, 2, 3),
        {
            "window_strides": (1, 2, 1), "padding": "SAME",
            "dimension_numbers": ("NDHWC", "DHWIO", "NDHWC"),
        },
    ),
    "no space": ((2, 3), (4, 3), {"window_strides": (), "padding": []}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_two_derivatives_equal_those_of_xla(x64, case):
    *shapes, options = case
    args: Any = tuple(draw(i, *shape) for i, shape in enumerate(shapes))
    tangents = tuple(draw(i + 2, *shape) for i, shape in enumerate(shapes))

    def derivatives(convolve):
        loss = lambda *args: jnp.sin(convolve(*args, **options)).sum()
        return convolve(*args, **options), jax.jvp(jax.grad(loss, (0, 1)), args, tangents)

    mine, theirs = jax.jit(lambda: (derivatives(ours), derivatives(lax.conv_general_dilated)))()
    assert_leaves_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["plain", "groups", "depthwise"])
@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [("bfloat16", None), ("bfloat16", "float32"), ("float32", None), ("int8", "int32")],
)
def test_dtypes_are_those_of_xla(dtype, preferred, groups):
    *shapes, options = line(groups=groups, filters=8, padding=[(1, 1)])
    args: Any = [(3 * draw(i, *shape)).astype(dtype) for i, shape in enumerate(shapes)]
    found = ours(*args, **options, preferred_element_type=preferred)
    expected = lax.conv_general_dilated(*args, **options, preferred_element_type=preferred)
    assert found.dtype == expected.dtype
    scale = np.abs(np.asarray(expected, np.float64)).max()
    rtol = float(jnp.finfo(found.dtype).eps) if jnp.issubdtype(found.dtype, jnp.floating) else 0
    np.testing.assert_allclose(
        np.asarray(found, np.float64), np.asarray(expected, np.float64), atol=2 * rtol * scale
    )


def test_the_precision_is_kept():
    *shapes, options = line()
    args: Any = [draw(i, *shape) for i, shape in enumerate(shapes)]
    jaxpr = jax.make_jaxpr(functools.partial(ours, precision="highest", **options))(*args)
    (found,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert found.params["precision"] == (lax.Precision.HIGHEST,) * 2


def test_a_transposed_convolution_multiplies_no_zeros():
    """It costs as much as the convolution with strides whose transposition it is."""
    *shapes, options = plane(lhs_dilation=(2, 2), padding=[(1, 1), (1, 1)])
    args: Any = [draw(i, *shape) for i, shape in enumerate(shapes)]
    jaxpr = jax.make_jaxpr(functools.partial(ours, **options))(*args)
    products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    count = sum(
        math.prod(eqn.invars[0].aval.shape) * eqn.outvars[0].aval.shape[-1] for eqn in products
    )
    num, height, width, channels = shapes[0]
    assert count <= num * (height + 1) * (width + 1) * channels * math.prod(shapes[1][:2]) * 4


def test_the_length_of_the_outputs():
    assert Window(3, 2, 1, 1, 1, 1).num_outputs(8) == 4
    assert Window(5, 1, 0, 0, 1, 1).num_outputs(3) == 0
