"""Operations are replaced wherever they occur, and what has a derivative of its own is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives

from jaxmaml import rewriting

AS_COSINE = {primitives.sin_p: lambda eqn, x: [jnp.cos(x)]}
PLACES = {
    "jit": lambda f, x: jax.jit(f)(x),
    "checkpoint": lambda f, x: jax.checkpoint(f)(x),
    "cond": lambda f, x: jax.lax.cond(x > 0, f, lambda x: x, x),
    "while": lambda f, x: jax.lax.while_loop(
        lambda c: c[0] < 1, lambda c: (c[0] + 1, f(c[1])), (0, x)
    )[1],
    "a scan with a constant": lambda f, x: jax.lax.scan(
        lambda c, row: (f(c) * jnp.cos(0 * x) + 0 * row, row), x, jnp.zeros(1)
    )[0],
    "scan": lambda f, x: jax.lax.scan(lambda c, row: (f(c) + 0 * row, c), x, jnp.arange(1.0))[0],
    "scan, outputs": lambda f, x: jax.lax.scan(lambda c, _: (c, f(c)), x, length=1)[1][0],
    "a closed-over value": lambda f, x: jax.jit(lambda: f(x))(),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_an_operation_is_replaced_wherever_it_occurs(place):
    function = lambda x: place(jnp.sin, x)
    found = rewriting.rewrite(function, AS_COSINE)
    np.testing.assert_allclose(found(0.5), np.cos(0.5), rtol=1e-6)
    derivative = jax.jvp(found, (0.5,), (1.0,))[1]
    np.testing.assert_allclose(derivative, -np.sin(0.5), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(found)(jnp.array([0.5])), [np.cos(0.5)], rtol=1e-6)


def test_what_has_a_derivative_rule_of_its_own_is_left_alone():
    sine = jax.custom_jvp(jnp.sin)
    sine.defjvps(lambda tangent, out, x: 7.0 * tangent)
    found = rewriting.rewrite(lambda x: sine(x) + jnp.sin(x), AS_COSINE)
    np.testing.assert_allclose(found(0.5), np.sin(0.5) + np.cos(0.5), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(found)(0.5), 7 - np.sin(0.5), rtol=1e-6)


def test_a_function_without_the_operation_is_called_as_it_is():
    calls = []

    def function(x):
        calls.append(x)
        return {"y": 2 * x}

    assert rewriting.rewrite(function, AS_COSINE)(1.5) == {"y": 3.0}
    assert calls[-1] == 1.5


def test_only_with_looks_for_other_operations():
    run = lambda only_with: rewriting.rewrite(jnp.sin, AS_COSINE, only_with=only_with)(0.5)
    np.testing.assert_allclose(run([primitives.exp_p]), np.sin(0.5), rtol=1e-6)
    np.testing.assert_allclose(run([primitives.sin_p]), np.cos(0.5), rtol=1e-6)
