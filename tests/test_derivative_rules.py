"""Losses with derivative rules that are not the derivative of their function."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from comparing import assert_close
from jax.flatten_util import ravel_pytree

import jaxmaml
from jaxmaml import derivative_rules, nn


def _with_vjp(forward, backward, *, calls_itself=False):
    """A function with a rule in reverse mode."""
    made = jax.custom_vjp(lambda x: forward(x))
    first = made if calls_itself else forward
    made.defvjp(lambda x: (first(x), None), lambda _, cotangent: (backward(cotangent),))
    return made


def _with_jvp(forward, pushed):
    made = jax.custom_jvp(lambda x: forward(x))
    made.defjvp(lambda primals, tangents: (forward(*primals), pushed(*tangents)))
    return made


def _clipped(cotangent):
    return cotangent * jnp.minimum(1, 0.05 / jnp.linalg.norm(cotangent))


def _tripled(x):
    return jax.custom_derivatives.linear_call(
        lambda _, x: 2 * x, lambda _, cotangent: 3 * cotangent, (), x
    )


FROM_USERS = {
    "a reversed gradient": _with_vjp(lambda x: x, lambda cotangent: -0.5 * cotangent),
    "a clipped gradient": _with_vjp(lambda x: x, _clipped),
    "straight through": _with_vjp(jnp.round, lambda cotangent: cotangent),
    "straight through, and calls itself": _with_vjp(
        jnp.round, lambda cotangent: cotangent, calls_itself=True
    ),
    "straight through, by jvp": _with_jvp(jnp.round, lambda tangent: tangent),
    "custom_gradient": jax.custom_gradient(lambda x: (x, lambda cotangent: -cotangent)),
    "of a library": functools.partial(optax.scale_gradient, scale=0.5),
    "linear_call": _tripled,
    "within jit": jax.jit(_with_vjp(lambda x: x, lambda cotangent: -cotangent)),
    "within scan": lambda x: jax.lax.scan(
        lambda carry, _: (FROM_USERS["a reversed gradient"](carry), None), x, None, length=2
    )[0],
}
TRUSTED = {
    "relu": jax.nn.relu,
    "softmax": jax.nn.softmax,
    "silu": jax.nn.silu,
    "sinc": jnp.sinc,
    "xlogy": lambda x: jax.scipy.special.xlogy(x**2, 1 + x**2),
    "stop_gradient": lambda x: x + jax.lax.stop_gradient(jnp.round(x) - x),
    "max-pooling": lambda x: nn.max_pool(jnp.tile(x.reshape(1, 1, *x.shape), (1, 2, 1, 1))),
}


def _loss(function, params, batch):
    """A loss on two heads, one of which lies behind the function."""
    features = jnp.tanh(batch["inputs"] @ params["body"])
    near = features @ params["first"] - batch["targets"]
    far = jnp.tanh(function(3 * features) @ params["second"]) - batch["targets"][::-1]
    return jnp.mean(near**2) + jnp.mean(far**2)


def _params_and_task():
    keys = iter(jax.random.split(jax.random.key(0), 7))
    draw = lambda *shape: jax.random.normal(next(keys), shape)
    params = {"body": draw(3, 4), "first": draw(4, 2), "second": draw(4, 2)}
    batch = lambda: {"inputs": draw(5, 3), "targets": draw(5, 2)}
    return params, jaxmaml.Task(batch(), batch())


def _meta_gradient(loss_fn, num_inner_steps, **options):
    params, task = _params_and_task()
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), num_inner_steps, **options)
    return jax.jit(jax.grad(learner.loss, has_aux=True))(params, task)[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["forward_over_reverse", "checkpoint"])
@pytest.mark.parametrize("name", FROM_USERS)
def test_the_meta_gradient_is_that_of_reverse_mode(name, mode):
    loss_fn = functools.partial(_loss, FROM_USERS[name])
    params, task = _params_and_task()

    @jax.jit
    @jax.grad
    def expected(params):
        for _ in range(2):
            grads = jax.grad(loss_fn)(params, task.support)
            params = jax.tree.map(lambda param, grad: param - 0.1 * grad, params, grads)
        return loss_fn(params, task.query)

    found = _meta_gradient(loss_fn, 2, adjoint=jaxmaml.Exact(mode))
    assert_close(found, expected(params), 1e-13)


@pytest.mark.usefixtures("x64")
def test_a_reversed_gradient_has_no_symmetric_hessian():
    """Otherwise the test before would hold for any mode."""
    params, task = _params_and_task()
    loss_fn = functools.partial(_loss, FROM_USERS["a reversed gradient"])
    flat, unravel = ravel_pytree(params)
    hessian = jax.jacrev(jax.grad(lambda flat: loss_fn(unravel(flat), task.support)))(flat)
    assert abs(hessian - hessian.T).max() > 0.01


@pytest.mark.parametrize("name", TRUSTED)
def test_rules_of_jax_and_of_the_package_keep_forward_over_reverse(name):
    assert not derivative_rules.of_users(jax.make_jaxpr(TRUSTED[name])(jnp.ones((4, 4))).jaxpr)


@pytest.mark.parametrize("name", FROM_USERS)
def test_implicit_refuses_a_loss_whose_hessian_may_not_be_symmetric(name):
    learner = jaxmaml.imaml(functools.partial(_loss, FROM_USERS[name]), optax.sgd(0.1), 2)
    with pytest.raises(TypeError, match=r"derivative rules of its own.* at .*use Exact\(\)"):
        jax.eval_shape(learner.loss, *_params_and_task())


def test_a_root_that_a_user_solves_for_is_a_rule_of_users():
    def root(x):
        return jax.lax.custom_root(
            lambda y: y**3 - x, x, lambda f, y: jnp.cbrt(x), lambda g, y: y / g(jnp.ones_like(y))
        )

    assert derivative_rules.of_users(jax.make_jaxpr(root)(8.0).jaxpr)


def test_memory_does_not_grow_with_the_activations_of_the_steps():
    def temporary(num_inner_steps):
        params = {"w": jnp.ones((32, 32))}
        task = jaxmaml.Task(jnp.ones((2048, 32)), jnp.ones((2048, 32)))
        reverse = FROM_USERS["a reversed gradient"]
        loss_fn = lambda params, batch: jnp.mean(jnp.tanh(reverse(jnp.tanh(batch @ params["w"]))))
        learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), num_inner_steps)
        lowered = jax.jit(jax.grad(learner.loss, has_aux=True)).lower(params, task)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    activations, parameters = 4 * 2048 * 32, 4 * 32 * 32
    growth = (temporary(12) - temporary(4)) / 8
    assert growth <= 1.1 * parameters < activations
