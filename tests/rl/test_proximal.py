"""The outer step of ProMP against its definition, epoch by epoch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmaml
from jaxmaml import rl
from jaxmaml.rl import proximal
from tests.rl.jitted import collect, meta_grad

BANDIT = rl.bandit(3)


def _two_good_arms(key):
    first = jax.random.bernoulli(key)
    return jnp.where(first, jnp.array([0.0, 0.9, 0.1]), jnp.array([0.0, 0.1, 0.9]))


UNLIKE_ARMS = BANDIT._replace(sample_task=_two_good_arms)
"""Arm 0 never pays: a policy before adaptation avoids it, and one after it has found the better arm."""
OPTIONS = {"weights": None, "chunk_size": None, "mesh": None, "specs": None}


@functools.cache
def _setup(environment=BANDIT, *, num_inner_steps=1, adjoint=None, rate=0.5, **sizes):
    sizes = {"num_trajectories": 5, "horizon": 4, **sizes}
    policy_fn, params = rl.policy(environment, hidden_sizes=(), rngs=nnx.Rngs(0))
    problem = rl.Problem(environment, policy_fn, **sizes)
    parts = rl.losses(problem, inner="lvc")
    learner = jaxmaml.maml(
        parts.loss_fn, optax.sgd(rate), num_inner_steps, adjoint=adjoint or jaxmaml.Exact(),
        query_loss_fn=parts.query_loss_fn, at_step=parts.at_step,
    )  # fmt: skip
    return problem, learner, params


def _tasks(num_tasks=3, environment=BANDIT):
    return rl.sampler(environment, num_tasks=num_tasks)(jax.random.key(0))


def _step(optimizer, learner, params, tasks, **options):
    state = jaxmaml.init_state(learner, optimizer, params)
    step = functools.partial(optimizer.meta_step, learner, **{**OPTIONS, **options})
    return jax.jit(step)(state, tasks)


def _close(first, second, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), first, second)


def _distribution(problem, learner, params, support, step):
    """The policy of an inner step at its support, of one task."""
    adapted, _ = learner.adapt(params, support, num_inner_steps=step)
    batch = jax.tree.map(lambda leaf: leaf[step], support)
    return batch, problem.policy_fn(adapted, batch.observations)


def _objective(problem, learner, clip, penalty, num_inner_steps, params, task):
    """The negative objective of one task, written out."""
    adapted, _ = learner.adapt(params, task.support)
    query, total = task.query, 0.0
    log_probs = problem.policy_fn(adapted, query.observations).log_prob(query.actions)
    ratio, gain = jnp.exp(log_probs - query.log_probs), query.advantages
    # Where the ratio has left the range in the direction of the advantage, it no longer counts.
    left = ((ratio > 1 + clip) & (gain > 0)) | ((ratio < 1 - clip) & (gain < 0))
    edge = jnp.where(gain > 0, 1 + clip, 1 - clip)
    surrogate = (jnp.where(left, edge, ratio) * gain).mean()
    for step in range(num_inner_steps):
        batch, policy = _distribution(problem, learner, params, task.support, step)
        total += batch.distribution.kl(policy).mean() / num_inner_steps
    return -surrogate + penalty * total, left.mean()


def _check_first_epoch(metrics, learner, params, batches):
    """Checks the metrics of the first epoch, in which all ratios are 1."""
    loss, grads, info = meta_grad(learner, params, batches)
    np.testing.assert_allclose(metrics["loss"], loss, atol=1e-6)
    np.testing.assert_allclose(metrics["query_loss"], info.query_loss.mean(), atol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(grads), rtol=1e-4)
    np.testing.assert_allclose(metrics["return"], batches.query.returns.mean(), rtol=1e-6)
    before = batches.support.returns[:, 0].mean()
    np.testing.assert_allclose(metrics["return_before"], before, rtol=1e-6)


@pytest.mark.parametrize(
    ("adjoint", "num_inner_steps"),
    [
        (jaxmaml.Exact(), 1),
        (jaxmaml.Exact(), 2),
        (jaxmaml.FirstOrder(), 2),
    ],
)
@pytest.mark.slow  # the metrics are those of the test below, too
def test_the_first_epoch_follows_the_gradient_of_the_likelihood_ratio(adjoint, num_inner_steps):
    """The penalty has no gradient where the support was sampled, however large its weight is."""
    problem, learner, params = _setup(adjoint=adjoint, num_inner_steps=num_inner_steps)
    tasks = _tasks()
    optimizer = rl.promp(problem, optax.sgd(1.0), num_epochs=1, kl_penalty=10.0)
    state, metrics = _step(optimizer, learner, params, tasks)
    batches = collect(problem, learner, params, tasks)
    moved = jax.tree.map(lambda a, b: a - b, params, state.params)
    _close(moved, meta_grad(learner, params, batches)[1], rtol=1e-4, atol=1e-6)
    _check_first_epoch(metrics, learner, params, batches)


@pytest.mark.parametrize(
    ("environment", "num_inner_steps"),
    [(BANDIT, 1), pytest.param(rl.navigation_2d(), 2, marks=pytest.mark.slow)],
    ids=["discrete", "continuous"],
)
def test_the_epochs_are_steps_on_the_objective_of_the_paper(environment, num_inner_steps):
    """A range so narrow that ratios leave it, and a penalty that has an effect."""
    problem, learner, params = _setup(environment, num_inner_steps=num_inner_steps)
    tasks, clip, penalty = _tasks(environment=environment), 0.03, 0.2
    optimizer = rl.promp(problem, optax.adam(0.1), num_epochs=4, clip=clip, kl_penalty=penalty)
    state, metrics = _step(optimizer, learner, params, tasks)

    batches, adam = collect(problem, learner, params, tasks), optax.adam(0.1)
    objective = functools.partial(_objective, problem, learner, clip, penalty, num_inner_steps)

    def mean(params):
        values, left = jax.vmap(objective, (None, 0))(params, batches)
        return values.mean(), left.mean()

    value_and_grad = jax.jit(jax.value_and_grad(mean, has_aux=True))
    opt_state, current = adam.init(params), params
    for _ in range(4):
        grads = value_and_grad(current)[1]
        updates, opt_state = adam.update(grads, opt_state)
        current = optax.apply_updates(current, updates)
    _close(state.params, current, rtol=1e-3, atol=1e-5)
    _close(state.opt_state, opt_state, rtol=1e-3, atol=1e-5)

    _check_first_epoch(metrics, learner, params, batches)
    # And those of the last epoch.
    (value, left), _ = value_and_grad(current)
    assert 0.1 < left < 0.9
    np.testing.assert_allclose(metrics["clipped"], left, atol=1e-6)
    without = functools.partial(_objective, problem, learner, clip, 0.0, num_inner_steps)
    plain = jax.jit(jax.vmap(without, (None, 0)))(current, batches)[0].mean()
    np.testing.assert_allclose(metrics["kl"], (value - plain) / penalty, rtol=1e-2)
    assert metrics["kl"] > 1e-3


def test_a_clipped_step_has_no_gradient():
    """Ratios of 2 and of 1/2, with advantages of both signs."""
    problem, _, params = _setup()
    options = rl.promp(problem, optax.sgd(1.0))
    request = rl.Request(jax.random.key(0), jnp.ones(3) / 2)
    query = jax.jit(problem.experience)(params, request)

    @jax.jit
    def clipped(ratio, advantage):
        batch = query._replace(
            log_probs=query.log_probs - jnp.log(ratio),
            advantages=jnp.full_like(query.advantages, advantage),
        )
        grads, fraction = jax.grad(
            lambda params: proximal._clipped(options, params, batch), has_aux=True
        )(params)
        return optax.tree.norm(grads), fraction

    for ratio, advantage in [(2.0, 1.0), (0.5, -1.0)]:
        assert clipped(ratio, advantage) == (0, 1)
    for ratio, advantage in [(2.0, -1.0), (0.5, 1.0), (1.2, 1.0), (0.8, -1.0)]:
        norm, fraction = clipped(ratio, advantage)
        assert norm > 1e-3
        assert fraction == 0


def test_the_penalty_is_zero_at_the_policy_that_sampled():
    problem, learner, params = _setup(num_inner_steps=2)
    batches = collect(problem, learner, params, _tasks())
    options = rl.promp(problem, optax.sgd(1.0))

    def kl(params):
        start = proximal.Measured((), jnp.zeros(()), jnp.zeros(()))
        loss = functools.partial(proximal._loss, options, learner, state=start)
        return jax.vmap(loss, (None, 0))(params, batches)[1].state.kl.mean()

    value_and_grad = jax.jit(jax.value_and_grad(kl))
    value, grads = value_and_grad(params)
    assert abs(value) < 1e-6
    assert optax.tree.norm(grads) < 1e-5
    other = jax.tree.map(lambda leaf: leaf + jnp.arange(leaf.size) / 4, params)
    assert value_and_grad(other)[0] > 1e-3


@pytest.mark.slow
def test_it_improves_the_return_of_a_bandit_and_repeats_itself():
    problem, learner, params = _setup(UNLIKE_ARMS, rate=2.0, num_trajectories=10, horizon=5)
    source, optimizer = rl.sampler(UNLIKE_ARMS, num_tasks=10), rl.promp(problem, optax.adam(3e-2))
    start = jaxmaml.init_state(learner, optimizer, params)

    def trained():
        *_, last = jaxmaml.fit(learner, optimizer, start, source, 30, key=jax.random.key(0))
        return last

    (state, metrics), (same_state, same_metrics) = trained(), trained()
    _close(same_state.params, state.params, rtol=0)
    _close(same_metrics, metrics, rtol=0)
    # Of at most 4.5. Without knowledge of the task, the best is 2.5.
    for name in ("return_before", "return"):
        assert metrics[name][-10:].mean() > metrics[name][:3].mean() + 0.5
    assert metrics["return"][-10:].mean() > 2.7


@functools.cache
def _weighted_step(chunk_size=None, num_devices=None):
    """A step on 4 tasks, of which one has no weight."""
    problem, learner, params = _setup()
    optimizer = rl.promp(problem, optax.sgd(1.0), num_epochs=3)
    mesh = None if num_devices is None else jaxmaml.parallel.make_mesh(num_devices)
    options = {"weights": jnp.array([1.0, 2.0, 0.0, 1.0]), "chunk_size": chunk_size, "mesh": mesh}
    return jax.device_get(_step(optimizer, learner, params, _tasks(4), **options))


def test_the_step_does_not_depend_on_chunks_and_devices():
    found, wanted = _weighted_step(chunk_size=1, num_devices=3), _weighted_step()
    _close(found[0].params, wanted[0].params, rtol=1e-4, atol=1e-6)
    _close(found[1], wanted[1], rtol=1e-4, atol=1e-6)
    assert wanted[1]["kl"] > 1e-4


@pytest.mark.slow
def test_a_step_is_one_program_without_transfers():
    problem, learner, params = _setup()
    optimizer, tasks = rl.promp(problem, optax.sgd(1.0)), _tasks()
    state = jaxmaml.init_state(learner, optimizer, params)
    step = jax.jit(functools.partial(optimizer.meta_step, learner, **OPTIONS))
    step(state, tasks)
    with jax.transfer_guard("disallow"):
        state, _ = step(state, tasks)
        state, _ = step(state, tasks)
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert state.step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, "clip must be a positive number; got 0.0"),
        ({"clip": float("nan")}, "clip must be a positive number"),
        ({"kl_penalty": -1.0}, "kl_penalty must be a finite number, 0 or more"),
        ({"num_epochs": 0}, "num_epochs must be an integer, 1 or more"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rl.promp(_setup()[0], optax.sgd(1.0), **options)


def test_what_would_be_ignored_is_refused():
    problem, learner, params = _setup()
    with pytest.raises(TypeError, match="must be an optax optimizer; got Trpo"):
        rl.promp(problem, rl.trpo(problem))  # pyright: ignore[reportArgumentType]
    optimizer = rl.promp(problem, optax.sgd(1.0))
    corrected = rl.with_sampling_correction(problem, learner)
    with pytest.raises(ValueError, match="make the learner without the correction"):
        _step(optimizer, corrected, params, _tasks())
    adjoint = jaxmaml.Annealed(jaxmaml.FirstOrder(), jaxmaml.Exact(), at=3)
    _, annealed, _ = _setup(adjoint=adjoint)
    with pytest.raises(ValueError, match="promp takes no learner with an annealed adjoint"):
        _step(optimizer, annealed, params, _tasks())


def test_a_policy_that_is_not_adapted_in_training_is_trained():
    problem, learner, params = _setup(num_inner_steps=0)
    state, metrics = _step(rl.promp(problem, optax.sgd(0.1)), learner, params, _tasks())
    assert metrics["kl"] == 0  # there is no policy that sampled a support
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, params)
    assert any(jax.tree.leaves(moved))
    # Nothing is sampled before adaptation, so that there is nothing to correct.
    corrected = rl.with_sampling_correction(problem, learner)
    task = jax.tree.map(lambda leaf: leaf[:1], collect(problem, learner, params, _tasks()))
    loss, found = (meta_grad(one, params, task)[0] for one in (learner, corrected))
    np.testing.assert_allclose(found, task.query.scale[0] * loss, rtol=1e-5)


def test_a_learner_with_another_meta_loss_is_refused():
    problem, _, params = _setup()
    parts = rl.losses(problem, inner="lvc")
    options = {"query_loss_fn": parts.query_loss_fn, "at_step": parts.at_step}
    reptile = jaxmaml.reptile(parts.loss_fn, optax.sgd(0.1), 1, **options)
    with pytest.raises(ValueError, match="promp takes only learners whose meta-loss is the query"):
        _step(rl.promp(problem, optax.sgd(0.1)), reptile, params, _tasks())
    with pytest.raises(ValueError, match="takes only learners whose meta-loss is the query loss"):
        rl.with_sampling_correction(problem, reptile)
