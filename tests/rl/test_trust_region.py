"""The outer step of TRPO against its definition, and what it does where no step is an improvement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import jaxmaml
from jaxmaml import rl
from jaxmaml.rl import trust_region
from tests.rl.jitted import collect, meta_grad

BANDIT = rl.bandit(3)
REVERSE = jaxmaml.Exact(mode="reverse")


@functools.cache
def _setup(environment=BANDIT, *, num_inner_steps=1, adjoint=REVERSE, **sizes):
    sizes = {"num_trajectories": 5, "horizon": 4, **sizes}
    policy_fn, params = rl.policy(environment, hidden_sizes=(), rngs=nnx.Rngs(0))
    problem = rl.Problem(environment, policy_fn, **sizes)
    parts = rl.losses(problem)
    learner = jaxmaml.maml(
        parts.loss_fn, optax.sgd(0.5), num_inner_steps,
        adjoint=adjoint, query_loss_fn=parts.query_loss_fn, at_step=parts.at_step,
    )  # fmt: skip
    return problem, learner, params


OPTIMIZER = rl.trpo(_setup()[0], max_kl=1e-4, damping=1e-3)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _jitted_step(optimizer, learner, state, tasks):
    options = {"weights": None, "chunk_size": None, "mesh": None, "specs": None}
    return optimizer.meta_step(learner, state, tasks, **options)


def _step(optimizer, learner, params, tasks):
    return _jitted_step(optimizer, learner, jaxmaml.init_state(learner, optimizer, params), tasks)


@pytest.mark.parametrize("num_inner_steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_collected_batches_are_what_the_learner_samples(num_inner_steps):
    environment = rl.navigation_2d()
    problem, learner, params = _setup(environment, num_inner_steps=num_inner_steps)
    tasks = rl.sampler(environment, num_tasks=3)(jax.random.key(0))
    collected = collect(problem, learner, params, tasks)
    assert collected.support.mask.shape == (3, num_inner_steps, 5, 4)
    grads = [meta_grad(learner, params, found)[1] for found in (tasks, collected)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), *grads)


def test_the_step_is_along_the_natural_gradient_to_the_edge_of_the_trust_region():
    """The Hessian of the divergence, dense and from its definition."""
    problem, learner, params = _setup()
    tasks = rl.sampler(BANDIT, num_tasks=4)(jax.random.key(0))
    batches = collect(problem, learner, params, tasks)
    flat, unflatten = ravel_pytree(params)

    @jax.jit
    def mean_kl(flat):
        of_task = lambda task: trust_region._kl_loss(problem, learner, unflatten(flat), task)[0]
        return jax.vmap(of_task)(batches).mean()

    @jax.jit
    def products(rows):
        product = trust_region._kl_hessian(problem, learner, params, batches, (), jnp.full(4, 0.25))
        return jax.lax.map(lambda row: ravel_pytree(product(unflatten(row)))[0], rows)

    dense = jax.jit(jax.hessian(mean_kl))(flat)
    np.testing.assert_allclose(products(jnp.eye(len(flat))), dense, atol=1e-5)

    state, metrics = _step(OPTIMIZER, learner, params, tasks)
    grads = ravel_pytree(meta_grad(learner, params, batches)[1])[0]
    natural = -jnp.linalg.solve(dense + 1e-3 * jnp.eye(len(flat)), grads)
    moved = ravel_pytree(state.params)[0] - flat
    cosine = natural @ moved / jnp.linalg.norm(natural) / jnp.linalg.norm(moved)
    assert cosine > 0.999
    assert metrics["accepted"]
    assert 0.5e-4 < metrics["kl"] <= 1e-4
    assert mean_kl(ravel_pytree(state.params)[0]) == pytest.approx(float(metrics["kl"]), rel=1e-3)


def test_a_search_without_an_improvement_keeps_the_parameters_and_is_counted():
    """Arms that never pay give no advantages: every loss is zero."""
    _, learner, params = _setup()
    tasks = rl.sampler(BANDIT, num_tasks=4)(jax.random.key(0))
    tasks = jaxmaml.Task(*(part._replace(task=jnp.zeros_like(part.task)) for part in tasks))
    state = jaxmaml.init_state(learner, OPTIMIZER, params)
    for _ in range(3):
        state, metrics = _jitted_step(OPTIMIZER, learner, state, tasks)
        assert not metrics["accepted"]
        assert metrics["kl"] == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert state.opt_state.num_rejected == 3
    assert state.step == 3


@pytest.mark.slow
def test_it_improves_the_return_after_adaptation():
    environment = rl.navigation_2d()
    problem, learner, params = _setup(environment, num_trajectories=10, horizon=20)
    source, optimizer = rl.sampler(environment, num_tasks=10), rl.trpo(problem, max_kl=0.05)
    start = jaxmaml.init_state(learner, optimizer, params)
    *_, (_, metrics) = jaxmaml.fit(learner, optimizer, start, source, 40, key=jax.random.key(0))
    assert metrics["return"][-10:].mean() > metrics["return"][:3].mean() + 2
    assert metrics["accepted"].mean() > 0.9
    assert (metrics["kl"] <= 0.05).all()


@pytest.mark.parametrize(
    ("num_inner_steps", "adjoint"),
    [(2, jaxmaml.Exact()), (1, jaxmaml.Exact(checkpoint_every=1))],
)
def test_an_adjoint_without_a_forward_derivative_is_refused_in_words(num_inner_steps, adjoint):
    problem, learner, params = _setup(num_inner_steps=num_inner_steps, adjoint=adjoint)
    tasks = rl.sampler(BANDIT, num_tasks=2)(jax.random.key(0))
    with pytest.raises(TypeError, match=r"adjoint=jaxmaml.Exact\(mode='reverse'\)"):
        _step(rl.trpo(problem), learner, params, tasks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kl": 0.0}, "max_kl must be positive; got 0.0"),
        ({"max_kl": float("nan")}, "max_kl must be positive"),
        ({"shrink": 1.0}, "shrink must be between 0 and 1"),
        ({"damping": -1.0}, "damping must be 0 or more"),
        ({"num_cg_steps": 0}, "num_cg_steps must be an integer, 1 or more"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rl.trpo(_setup()[0], **options)


def test_a_policy_that_is_not_adapted_in_training_is_trained():
    problem, learner, params = _setup(num_inner_steps=0)
    tasks = rl.sampler(BANDIT, num_tasks=2)(jax.random.key(0))
    _, metrics = _step(rl.trpo(problem), learner, params, tasks)
    assert metrics["accepted"]
    assert np.isfinite([metrics["return_before"], metrics["return"]]).all()
