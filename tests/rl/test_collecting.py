"""The outer optimizers that sample for themselves: weights of tasks, devices, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmaml
from jaxmaml import diagnostics, parallel, rl

BANDIT = rl.bandit(3)


@functools.cache
def _adapted():
    """(problem, learner, parameters) with an inner loop."""
    policy_fn, params = rl.policy(BANDIT, hidden_sizes=(), rngs=nnx.Rngs(0))
    problem = rl.Problem(BANDIT, policy_fn, num_trajectories=5, horizon=4)
    parts = rl.losses(problem, inner="lvc")
    learner = jaxmaml.maml(
        parts.loss_fn, optax.sgd(0.5), 1,
        adjoint=jaxmaml.Exact(mode="reverse"), query_loss_fn=parts.query_loss_fn, at_step=parts.at_step,
    )  # fmt: skip
    return problem, learner, params


@functools.cache
def _remembered():
    """(problem, learner, parameters) with a memory."""
    policy, params = rl.recurrent_policy(BANDIT, hidden_size=6, rngs=nnx.Rngs(0))
    problem = rl.RecurrentProblem(BANDIT, policy, num_episodes=2, horizon=4)
    return problem, rl.rl_squared(problem), params


def _trpo():
    problem, *rest = _adapted()
    return rl.trpo(problem), *rest


def _promp():
    problem, *rest = _adapted()
    return rl.promp(problem, optax.sgd(1.0), num_epochs=2), *rest


def _ppo():
    return rl.ppo(optax.sgd(1.0), num_epochs=2), *_remembered()[1:]


OPTIMIZERS = {"trpo": _trpo, "promp": _promp, "ppo": _ppo}


def _setup(name, num_tasks=4):
    """(a step of this optimizer, its first state, tasks)"""
    optimizer, learner, params = OPTIMIZERS[name]()
    state = jaxmaml.init_state(learner, optimizer, params)
    tasks = rl.sampler(BANDIT, num_tasks=num_tasks)(jax.random.key(0))
    return functools.partial(optimizer.meta_step, learner), state, tasks


def _spoiled(tasks, index):
    """The tasks with one that cannot be played: its rewards are NaN."""
    spoil = lambda request: request._replace(task=request.task.at[index].set(jnp.nan))
    is_request = lambda node: isinstance(node, rl.Request)
    return jax.tree.map(spoil, tasks, is_leaf=is_request)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_relative_and_a_task_without_weight_may_hold_anything(name):
    """A weight of two is a task that comes twice."""
    step, state, tasks = _setup(name)
    step = jax.jit(step)
    twice = jax.tree.map(lambda leaf: leaf[jnp.array([0, 1, 2, 2])], tasks)
    wanted = step(state, twice, weights=jnp.ones(4))
    ends = [
        step(state, found, weights=jnp.array([0.5, 0.5, 1.0, 0.0]))
        for found in (tasks, _spoiled(tasks, 3))
    ]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ends[1], wanted
    )


@pytest.mark.parametrize("name", ["trpo", pytest.param("promp", marks=pytest.mark.slow)])
def test_each_device_has_the_work_of_its_tasks(name):
    """Operations of a device, without those of the sampling, which XLA divides by itself."""
    step, state, tasks = _setup(name, num_tasks=32)
    problem, learner, params = _adapted()
    sample = functools.partial(rl.collect, problem, learner)
    sampling = diagnostics.count_flops(sample, params, tasks)
    alone, shared = (
        diagnostics.count_flops(functools.partial(step, mesh=mesh), state, tasks) - sampling
        for mesh in (None, parallel.make_mesh(4))
    )
    assert 0 < shared < alone / 3.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_axis_name_is_refused(name):
    step, state, tasks = _setup(name)
    with pytest.raises(ValueError, match=f"{name} takes no axis_name: give it the mesh"):
        step(state, tasks, axis_name="tasks")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_wrong_weights_are_refused(name):
    step, state, tasks = _setup(name)
    with pytest.raises(ValueError, match="weights must be finite, not negative and not all zero"):
        step(state, tasks, weights=-jnp.ones(4))
