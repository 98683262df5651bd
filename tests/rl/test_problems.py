"""The losses of a policy: what they differentiate, and that learners take them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmaml
from jaxmaml import rl


def _parts(environment, **sizes):
    policy_fn, params = rl.policy(environment, hidden_sizes=(8,), rngs=nnx.Rngs(0))
    problem = rl.Problem(environment, policy_fn, **{"num_trajectories": 4, "horizon": 6, **sizes})
    return problem, rl.losses(problem), params


def _options(parts):
    return {"query_loss_fn": parts.query_loss_fn, "at_step": parts.at_step}


def _first(environment):
    """The first task of a source."""
    tasks = rl.sampler(environment, num_tasks=1)(jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf[0], tasks)


def _descent(params, grads, rate):
    return jax.tree.map(lambda param, grad: param - rate * grad, params, grads)


ENVIRONMENTS = {"continuous": rl.navigation_2d(), "discrete": rl.tabular_mdp(3, 2)}
LEARNERS = {
    "maml": lambda parts: jaxmaml.maml(parts.loss_fn, optax.sgd(0.1), 2, **_options(parts)),
    "fomaml": lambda parts: jaxmaml.fomaml(parts.loss_fn, optax.sgd(0.1), 2, **_options(parts)),
    "meta_sgd": lambda parts: jaxmaml.meta_sgd(parts.loss_fn, 2, inner_lr=0.1, **_options(parts)),
}


FAST = {("fomaml", "discrete"), ("meta_sgd", "continuous")}
"""The pairs that the default tests train; each compiles for 15 seconds or more."""


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow)
        for pair in itertools.product(LEARNERS, ENVIRONMENTS)
    ],
)
def test_a_learner_trains_and_is_evaluated(name, environment):
    environment = ENVIRONMENTS[environment]
    _, parts, params = _parts(environment)
    learner, optimizer = LEARNERS[name](parts), optax.adam(1e-2)
    state = jaxmaml.init_state(learner, optimizer, params)
    start = jax.device_get(state.params)
    source, key = rl.sampler(environment, num_tasks=3), jax.random.key(1)
    *_, (state, metrics) = jaxmaml.fit(learner, optimizer, state, source, 4, key=key)
    assert np.isfinite(metrics["grad_norm"]).all()
    assert (metrics["grad_norm"] > 0).all()
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), state.params, start)))
    returns = jaxmaml.evaluate(learner, parts.metric_fn, state, source, num_tasks=5, key=key)
    assert returns.shape == (5, 3)
    assert np.isfinite(returns).all()


def test_the_gradient_of_both_surrogates_is_the_policy_gradient():
    """Where the batch was sampled, the ratio of likelihoods has the derivative of their logarithm."""
    problem, parts, params = _parts(rl.navigation_2d())
    request = rl.Request(jax.random.key(0), jnp.ones(2) / 4)
    batch = jax.jit(problem.experience)(params, request)
    log, ratio = (
        jax.jit(jax.grad(fn))(params, batch) for fn in (parts.loss_fn, parts.query_loss_fn)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), log, ratio)
    assert optax.tree.norm(log) > 1e-3


@pytest.mark.slow  # test_trust_region.py has the same of `collect`
def test_sampled_batches_give_the_meta_gradient_of_requests():
    """A support that was sampled along the inner loop, and a query after it, are the same task."""
    problem, parts, params = _parts(rl.navigation_2d())
    learner, task = LEARNERS["maml"](parts), _first(rl.navigation_2d())
    adapted, support = params, []
    for step in range(2):
        batch = parts.at_step(adapted, task.support, step)[1]
        adapted = _descent(adapted, jax.grad(parts.loss_fn)(adapted, batch), 0.1)
        support.append(batch)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *support)
    sampled = jaxmaml.Task(stacked, problem.experience(adapted, task.query))

    grads = [jax.grad(learner.loss, has_aux=True)(params, task)[0] for task in (task, sampled)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *grads)


def test_the_exact_meta_gradient_is_that_of_the_sampled_batches():
    """Central differences of the meta-loss, with the batches held."""
    problem, parts, params = _parts(rl.tabular_mdp(3, 2), num_trajectories=8)
    task = _first(problem.environment)
    learner = jaxmaml.maml(parts.loss_fn, optax.sgd(1.0), 1, **_options(parts))
    experience = jax.jit(problem.experience)
    support = experience(params, task.support)
    adapted = _descent(params, jax.jit(jax.grad(parts.loss_fn))(params, support), 1.0)
    stacked = jax.tree.map(lambda leaf: leaf[None], support)
    held = jaxmaml.Task(stacked, experience(adapted, task.query))

    with jax.enable_x64(True):
        double = lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf
        held, start = jax.tree.map(double, (held, params))
        run = jax.jit(jax.value_and_grad(lambda params: learner.loss(params, held)[0]))
        grads = run(start)[1]
        direction = jax.tree.map(lambda leaf: jnp.cos(1e3 * leaf + 1), start)
        moved = lambda size: optax.tree.add_scale(start, size, direction)
        ends = [run(moved(size))[0] for size in (1e-5, -1e-5)]
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(optax.tree.vdot(grads, direction), slope, rtol=1e-6)


def test_a_batch_does_not_stand_for_later_inner_steps():
    problem, parts, params = _parts(ENVIRONMENTS["discrete"])
    learner = lambda number: jaxmaml.maml(
        parts.loss_fn, optax.sgd(0.1), number, adjoint=jaxmaml.FirstOrder(), **_options(parts)
    )
    tasks = rl.sampler(ENVIRONMENTS["discrete"], num_tasks=1)(jax.random.key(0))
    found = jax.tree.map(lambda leaf: leaf[0], rl.collect(problem, learner(1), params, tasks))
    assert jnp.isfinite(learner(1).loss(params, found)[0])
    assert jnp.isnan(learner(2).loss(params, found)[0])


def test_batches_are_sampled_along_the_inner_loop_of_the_training():
    problem, parts, params = _parts(ENVIRONMENTS["discrete"])
    none = lambda params, batch: 0 * parts.loss_fn(params, batch)
    make = lambda **options: jaxmaml.maml(
        parts.loss_fn, optax.sgd(0.5), 1, **_options(parts), **options
    )
    tasks = rl.sampler(ENVIRONMENTS["discrete"], num_tasks=1)(jax.random.key(0))
    queries = [
        rl.collect(problem, learner, params, tasks).query
        for learner in (make(), make(test_loss_fn=none))
    ]
    np.testing.assert_array_equal(queries[0].log_probs, queries[1].log_probs)
