"""Trainings of policies: the same curves, one program, several devices, and a resumption."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmaml
from jaxmaml import checkpoint, dispatch, outer, parallel, rl

NAVIGATION = rl.navigation_2d()
SOURCE = rl.sampler(NAVIGATION, num_tasks=5)
POLICY_FN, PARAMS = rl.policy(NAVIGATION, hidden_sizes=(4,), rngs=nnx.Rngs(0))
PROBLEM = rl.Problem(NAVIGATION, POLICY_FN, num_trajectories=4, horizon=6)
PARTS = rl.losses(PROBLEM)
OPTIMIZERS = {
    "adam": optax.adam(1e-2),
    "trpo": rl.trpo(PROBLEM),
    "promp": rl.promp(PROBLEM, optax.adam(1e-2), num_epochs=2),
}
ADJOINTS = {"exact": jaxmaml.Exact(mode="reverse"), "first": jaxmaml.FirstOrder()}
SLOW = pytest.mark.slow
"""The programs of TRPO and ProMP take long to compile."""
HOST_TRANSFERS = ("infeed", "outfeed", "stablehlo.send", "stablehlo.recv", "callback")


def _learner(order="exact", num_inner_steps=1):
    return jaxmaml.maml(
        PARTS.loss_fn, optax.sgd(0.1), num_inner_steps,
        adjoint=ADJOINTS[order], query_loss_fn=PARTS.query_loss_fn, at_step=PARTS.at_step,
    )  # fmt: skip


def _host_transfers(fn, *args):
    """The words of a program that mean a transfer to the host."""
    text = jax.jit(fn).lower(*args).as_text()
    return [word for word in HOST_TRANSFERS if word in text]


def _fit(optimizer, num_outer_steps=4, *, seed=0, **options):
    """(state, query loss of each step)."""
    learner = _learner()
    # float64 where a test enables it, else float32
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), PARAMS)
    state = jaxmaml.init_state(learner, optimizer, params)
    found = list(jaxmaml.fit(
        learner, optimizer, state, SOURCE, num_outer_steps, key=jax.random.key(seed), **options
    ))  # fmt: skip
    return found[-1][0], [loss for _, metrics in found for loss in metrics["query_loss"].tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_seed_decides_about_the_curve(name):
    first, again, other = (_fit(OPTIMIZERS[name], seed=seed)[1] for seed in (0, 0, 1))
    assert first == again
    assert first != other


@functools.cache
def _alone(name):
    """The end of a training on one device, in float64."""
    state, losses = _fit(OPTIMIZERS[name], 2)
    return parallel.to_host(state.params), losses


@pytest.mark.parametrize("num_devices", [pytest.param(2, marks=SLOW), 3])
@pytest.mark.parametrize(
    "name", [pytest.param("adam", marks=SLOW), "trpo", pytest.param("promp", marks=SLOW)]
)
def test_one_two_and_three_devices_agree(name, num_devices, x64):
    """In float64, since conjugate gradients and trajectories enlarge errors of rounding."""
    params, losses = _alone(name)
    spread, found = _fit(OPTIMIZERS[name], 2, mesh=parallel.make_mesh(num_devices))
    np.testing.assert_allclose(found, losses, rtol=1e-3, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
        parallel.to_host(spread.params), params,
    )  # fmt: skip


@pytest.mark.parametrize("order", ["exact", pytest.param("first", marks=SLOW)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_outer_step_is_one_program_without_host_transfers(name, order):
    """Sampling before and after adaptation, both derivatives, and the step."""
    learner, optimizer = _learner(order), OPTIMIZERS[name]
    state = jaxmaml.init_state(learner, optimizer, PARAMS)

    @jax.jit
    def outer_step(state, key):
        tasks = SOURCE(key)
        return dispatch.make_meta_step(learner, optimizer, "auto", None)(state, tasks, None)

    assert "stablehlo.while" in outer_step.lower(state, jax.random.key(0)).as_text()
    assert not _host_transfers(outer_step, state, jax.random.key(0))


def test_a_transfer_to_the_host_would_be_seen():
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    assert _host_transfers(lambda x: jax.pure_callback(np.sin, shape, x), jnp.ones(()))


@pytest.mark.parametrize(
    "name", ["adam", pytest.param("trpo", marks=SLOW), pytest.param("promp", marks=SLOW)]
)
def test_an_interrupted_training_ends_bit_for_bit_as_a_whole_one(name, tmp_path):
    whole, _ = _fit(OPTIMIZERS[name], 6, num_steps_per_dispatch=2)
    options = {"num_steps_per_dispatch": 2, "checkpoints": checkpoint.Manager(tmp_path, every=2)}
    _fit(OPTIMIZERS[name], 4, **options)
    resumed, losses = _fit(OPTIMIZERS[name], 6, **options)
    assert len(losses) == 2
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)

    # A training that is done gives the metrics of no steps, those of its optimizer.
    names = getattr(OPTIMIZERS[name], "metrics", outer.METRICS)
    start = jaxmaml.init_state(_learner(), OPTIMIZERS[name], PARAMS)
    ((_, metrics),) = jaxmaml.fit(
        _learner(), OPTIMIZERS[name], start, SOURCE, 6, key=jax.random.key(0), **options
    )
    assert {key: len(rows) for key, rows in metrics.items()} == dict.fromkeys(names, 0)


@pytest.mark.parametrize(
    "name", ["adam", pytest.param("trpo", marks=SLOW), pytest.param("promp", marks=SLOW)]
)
def test_rewards_that_are_not_finite_are_named_with_their_step_and_task(name):
    def step(key, state, action, goal):
        found = NAVIGATION.step(key, state, action, goal)
        return found._replace(reward=jnp.where(goal[0] > 0.4, jnp.nan, found.reward))

    environment = NAVIGATION._replace(step=step)
    problem = PROBLEM._replace(environment=environment)
    parts = rl.losses(problem)
    optimizer = OPTIMIZERS[name]
    if name != "adam":
        optimizer = dataclasses.replace(optimizer, problem=problem)
    learner = jaxmaml.maml(
        parts.loss_fn, optax.sgd(0.1), 1,
        adjoint=ADJOINTS["exact"], query_loss_fn=parts.query_loss_fn, at_step=parts.at_step,
    )  # fmt: skip
    source, key = rl.sampler(environment, num_tasks=5), jax.random.key(0)
    steps = [source(jax.random.fold_in(key, i)).support.task[:, 0] > 0.4 for i in range(9)]
    first = next(i for i, bad in enumerate(steps) if bad.any())
    place = f"task {int(steps[first].argmax())}, inner step 1: batch rewards"
    start = jaxmaml.init_state(learner, optimizer, PARAMS)
    with pytest.raises(jaxmaml.NonFiniteError, match=f"outer step {first}: .*{place}"):
        list(jaxmaml.fit(learner, optimizer, start, source, 9, key=key))
