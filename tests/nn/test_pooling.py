"""The fast pooling selects what a plain maximum selects, and normalizing after it changes nothing."""

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import draw
from comparing import assert_leaves_close
from flax import nnx
from jax import lax

from jaxmaml import nn
from jaxmaml.nn.norm import POLICIES


def plain_pool(inputs, window=2):
    """The maximum over strided slices, the first of equal ones."""
    rows, columns = (side // window * window for side in inputs.shape[-3:-1])
    places = np.ndindex(window, window)
    entries = [inputs[..., i:rows:window, j:columns:window, :] for i, j in places]
    larger = lambda a, b: jnp.where((a >= b) | jnp.isnan(a), a, b)
    return functools.reduce(larger, entries)


def leaky_relu(inputs):
    return jax.nn.leaky_relu(inputs, 0.1)


def derivatives(function, args, tangents):
    """The value, the gradient and its directional derivative."""
    loss = lambda args: jnp.sin(function(args)).sum()
    grads, second = jax.jvp(jax.grad(loss), (args,), (tangents,))
    return function(args), grads, second


@pytest.mark.parametrize("window", [1, 2, 3])
def test_max_pool_and_its_gradient_equal_a_window_reduction(window):
    inputs = draw(0, 2, 7, 8, 3)

    def reduced(x):
        size = (1, window, window, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, size, size, "VALID")

    np.testing.assert_array_equal(nn.max_pool(inputs, window), reduced(inputs))
    ours, theirs = (
        jax.grad(lambda x, pool=pool: jnp.sin(pool(x)).sum())(inputs)
        for pool in (lambda x: nn.max_pool(x, window), reduced)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_max_pool_gives_the_gradient_of_a_tie_to_one_entry():
    grad = jax.grad(lambda x: nn.max_pool(x).sum())(jnp.ones((1, 2, 3, 1)))
    np.testing.assert_array_equal(grad[0, ..., 0], [[1, 0, 0], [0, 0, 0]])


def test_max_pool_keeps_nan():
    for place in np.ndindex(2, 2):
        image = np.arange(4.0).reshape(1, 2, 2, 1)
        image[0, *place, 0] = np.nan
        assert jnp.isnan(nn.max_pool(jnp.asarray(image))).all()


def test_max_pool_gradient_compares_no_values_for_equality():
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: nn.max_pool(x).sum()))(jnp.ones((1, 4, 4, 1)))
    compared = [eqn.invars[0].aval.dtype for eqn in jaxpr.eqns if eqn.primitive.name == "eq"]
    assert not any(jnp.issubdtype(dtype, jnp.floating) for dtype in compared)


def _norm(policy, num_channels):
    num_steps = 2 if policy == "per_step" else None
    norm: Any = nn.make_norm(policy, num_channels, num_steps=num_steps, param_dtype=jnp.float64)
    if hasattr(norm, "scale"):  # both signs
        norm.scale[...] = draw(5, *norm.scale.shape)
        norm.offset[...] = draw(6, *norm.offset.shape)
    return norm


def _both_orders(policy, mode, weighted, num_branches, window):
    """Returns (outputs, gradient, its derivative) and the state after it, of both orders."""
    norms = nnx.List(_norm(policy, 6) for _ in range(num_branches))
    if mode == "stored":
        norms.eval()
    graph, params, state = nnx.split(norms, nnx.Param, ...)
    images = [draw(i, 5, 7, 6, 6) for i in range(num_branches)]
    weights = jnp.array([1.0, 0, 1, 0.5, 2]) if weighted else None
    activation = jax.nn.relu if num_branches == 1 else leaky_relu

    def late(norms, images):
        branches = list(zip(images, norms, strict=True))
        return nn.normalize_and_pool(branches, weights, activation=activation, window=window)

    def early(norms, images):
        normed = [norm(x, weights) for x, norm in zip(images, norms, strict=True)]
        return plain_pool(activation(functools.reduce(jnp.add, normed)), window)

    def run(order):
        def function(args):
            module = nnx.merge(graph, args[0], state, copy=True)
            return order(module, args[1])

        args = params, images
        tangents = jax.tree.map(lambda leaf: draw(leaf.size, *leaf.shape), args)
        module = nnx.merge(graph, params, state, copy=True)
        order(module, images)
        return derivatives(function, args, tangents), nnx.state(module, nnx.BatchStat)

    return jax.jit(lambda: (run(late), run(early)))()


STORED = ("inductive", "running")


@pytest.mark.parametrize(
    ("policy", "weighted"),
    [
        *((policy, False) for policy in POLICIES if policy not in STORED),
        *((policy, True) for policy in ("transductive", *STORED)),
    ],
)
def test_normalizing_after_the_pooling_changes_nothing(x64, policy, weighted):
    late, early = _both_orders(policy, "batch", weighted, 1, 2)
    assert_leaves_close(late, early, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["inductive", "per_step"])
def test_stored_statistics_are_used_after_the_pooling(x64, policy):
    late, early = _both_orders(policy, "stored", False, 1, 3)
    assert_leaves_close(late, early, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", ["transductive", "group"])
def test_the_sum_of_two_branches_is_pooled(x64, policy):
    late, early = _both_orders(policy, "batch", True, 2, 2)
    assert_leaves_close(late, early, rtol=1e-12, atol=1e-12)


def test_a_scale_of_zero_makes_ties_whose_gradient_goes_to_the_first():
    norm: Any = nn.make_norm("running", 3)
    images = draw(0, 2, 4, 4, 3)
    norm.eval()
    norm.scale[...] = jnp.array([0.0, 1.0, -1.0])
    norm.offset[...] = jnp.ones(3)
    graph, params, state = nnx.split(norm, nnx.Param, ...)

    def grad(pooled):
        loss = lambda params: (pooled(nnx.merge(graph, params, state)) * draw(1, 2, 2, 2, 3)).sum()
        return jax.jit(jax.grad(loss))(params)

    late = grad(lambda norm: nn.normalize_and_pool([(images, norm)]))
    assert_leaves_close(late, grad(lambda norm: plain_pool(jax.nn.relu(norm(images)))), rtol=1e-6)


@pytest.mark.parametrize("pool", [nn.max_pool, plain_pool])
def test_infinite_entries_beside_the_largest_one_have_no_influence(pool):
    image = jnp.array([[-jnp.inf, 1.0], [-jnp.inf, 2.0]]).reshape(1, 2, 2, 1)
    value, grad = jax.value_and_grad(lambda x: pool(x).sum())(image)
    assert value == 2
    np.testing.assert_array_equal(grad.reshape(4), [0, 0, 0, 1])


@pytest.mark.parametrize("dtype", [jnp.bool, jnp.int8, jnp.uint8, jnp.int32, jnp.bfloat16])
def test_max_pool_keeps_the_dtype(dtype):
    images = (3 * draw(0, 2, 5, 6, 3)).astype(dtype)
    pooled = nn.max_pool(images)
    assert pooled.dtype == dtype
    np.testing.assert_array_equal(pooled, plain_pool(images))


def test_derivatives_contain_no_interior_pads():
    """XLA CPU runs these as scalar code."""
    images = draw(0, 2, 7, 8, 3)
    run = lambda x: derivatives(nn.max_pool, x, x)
    pads = [
        eqn.params["padding_config"]
        for eqn in jax.make_jaxpr(run)(images).eqns
        if eqn.primitive.name == "pad"
    ]
    assert all(interior == 0 for config in pads for _, _, interior in config)
    strided = jax.make_jaxpr(lambda x: derivatives(plain_pool, x, x))(images)
    assert "pad" in {eqn.primitive.name for eqn in strided.eqns}  # the test would see them


def test_entries_are_compared_once_not_once_per_use():
    """A compiler may compute the place of the maximum again in each use of it."""
    inputs, norm = draw(0, 2, 4, 4, 3), nn.make_norm("transductive", 3)
    pool = lambda x: nn.normalize_and_pool([(x, norm)])
    compiled = jax.jit(lambda x: derivatives(pool, x, x)[1:]).lower(inputs).compile()
    # Only the search for a maximum asks whether a number is NaN.
    text = compiled.as_text() or ""
    assert 1 <= text.count("direction=NE") <= 2


@pytest.mark.parametrize(
    ("shape", "window", "named"),
    [((4, 1), 2, "inputs"), ((1, 4, 4, 1), 5, "window"), ((1, 4, 4, 1), 0, "window")],
)
def test_max_pool_names_what_is_wrong(shape, window, named):
    with pytest.raises(ValueError, match=named):
        nn.max_pool(jnp.ones(shape), window)


@pytest.mark.parametrize("policy", ["transductive", "group", "none"])
def test_the_number_of_examples_may_be_unknown(policy):
    """Models are exported for any number."""
    (num,) = jax.export.symbolic_shape("num")
    images = jax.ShapeDtypeStruct((num, 7, 6, 4), jnp.float32)
    norm = nn.make_norm(policy, 4)
    pooled = jax.eval_shape(lambda x: nn.normalize_and_pool([(x, norm)]), images)
    assert pooled.shape == (num, 3, 3, 4)
