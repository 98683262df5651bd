"""Operations counted in the jaxpr."""

import jax
import jax.numpy as jnp
import optax
from bowls import EXACT, FIRST
from problems import smooth

import jaxmaml
from jaxmaml import diagnostics


def test_flops_of_products_and_convolutions():
    a, b = jnp.ones((7, 2, 3)), jnp.ones((7, 3, 4))
    assert diagnostics.count_flops(jnp.matmul, a, b) == 2 * 7 * 2 * 3 * 4

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, w = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 5))
    assert diagnostics.count_flops(conv, x, w) == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)


def test_flops_inside_scan_jit_cond_and_custom_rules():
    w = jnp.ones((4, 4))
    product = jax.jit(lambda x: x @ w)
    rule = jax.custom_vjp(product)
    rule.defvjp(lambda x: (x @ w, x), lambda x, ct: (ct @ w.T,))

    def scanned(x):
        return jax.lax.scan(lambda x, _: (rule(product(x)), None), x, length=10)[0]

    one = 2 * 4 * 4
    assert diagnostics.count_flops(scanned, jnp.ones(4)) == 10 * 2 * one
    branches = lambda x: jax.lax.cond(x[0] > 0, product, lambda x: product(product(x)), x)
    assert diagnostics.count_flops(branches, jnp.ones(4)) == 2 * one


def test_ten_inner_steps_cost_ten_times_one():
    problem = smooth()

    def flops(num_inner_steps, adjoint):
        """Beyond those of no inner step."""

        def count(number):
            learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), number, adjoint=adjoint)
            grad = lambda params, tasks: jaxmaml.meta_grad(learner, params, tasks)[1]
            return diagnostics.count_flops(grad, problem.params, problem.tasks)

        return count(num_inner_steps) - count(0)

    assert flops(10, FIRST) == 10 * flops(1, FIRST) > 0
    assert flops(20, EXACT) == 10 * flops(2, EXACT) > 0
    # A single exact step keeps its values, which spares it a gradient that each of several computes.
    assert flops(1, EXACT) < flops(2, EXACT) / 2


def test_a_linear_system_counts_once():
    """A solver holds its programs for derivatives, too, which do not run."""
    matrix = jnp.eye(10)
    solve = lambda b: jaxmaml.Implicit().solve_linear(lambda x: matrix @ x, b)
    one = 2 * 10 * 10
    # A few products: that of the residual at the start, and those of an iteration, whose loop is
    # counted once.
    assert one <= diagnostics.count_flops(solve, jnp.ones(10)) <= 4 * one
