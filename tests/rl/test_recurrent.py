"""RL²: the memory, the likelihoods and the gradient of whole trials, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmaml
from jaxmaml import rl

BANDIT = rl.bandit(3)
ENVIRONMENTS = {"continuous": rl.navigation_2d(), "discrete": rl.tabular_mdp(3, 2)}
SIZES = {"num_episodes": 3, "num_trajectories": 2, "horizon": 4}


@functools.cache
def _counter(last=1, after=jnp.nan):
    """An environment that counts its steps and ends with step `last`; what comes later is `after`."""

    def step(key, count, action, task):
        over = count > last
        seen = jnp.where(over, after, 1.0 * count + 1)[None]
        return rl.Step(count + 1, seen, jnp.where(over, after, 10.0 + count), count == last)

    start = lambda key, task: (jnp.array(0), jnp.zeros(1))
    return rl.Environment(lambda key: jnp.array(0.0), start, step, 1, 2, is_discrete=True)


@functools.cache
def _policy(environment):
    policy, params = rl.recurrent_policy(environment, hidden_size=6, rngs=nnx.Rngs(0))
    # The values start from zero, and would not be seen to be used.
    return policy, jax.tree.map(
        lambda leaf: leaf + 0.3 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )


def _setup(environment, *, options=None, **sizes):
    policy, params = _policy(environment)
    problem = rl.RecurrentProblem(environment, policy, **{**SIZES, **sizes})
    return problem, rl.rl_squared(problem, **(options or {})), params


@functools.partial(jax.jit, static_argnums=0)
def _experience(problem, params, task):
    return problem.experience(params, task)


@functools.partial(jax.jit, static_argnums=0)
def _experiences(problem, params, tasks):
    return jax.vmap(lambda task: problem.experience(params, task))(tasks)


@functools.cache
def _value_and_grad_of(learner):
    return jax.jit(jax.value_and_grad(learner.loss, has_aux=True))


def _grad(learner, params, task):
    """The meta-gradient in one task."""
    return _value_and_grad_of(learner)(params, task)[1]


@functools.partial(jax.jit, static_argnums=0)
def _replay(problem, params, trials):
    return problem.replay(params, trials)


def _first(environment, seed=0):
    """The first task of a source."""
    tasks = rl.sampler(environment, num_tasks=1)(jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf[0], tasks)


def _rows(trials, trajectory):
    """The fields of one trial, step by step."""
    flat = lambda leaf: np.asarray(leaf[trajectory]).reshape(-1, *leaf.shape[3:])
    return jax.tree.map(flat, trials)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_trial_is_that_of_a_loop(name):
    """The memory goes from step to step and from episode to episode."""
    environment = ENVIRONMENTS[name]
    problem, _, params = _setup(environment)
    trials = _experience(problem, params, _first(environment)).trials
    for trajectory in range(2):
        rows = _rows(trials, trajectory)
        play = jax.jit(problem.policy.step)
        hidden, action = problem.policy.start(params)[None], np.zeros(environment.action_size)
        reward, done = 0.0, 0.0
        for step in range(12):
            observation = rows.inputs[step, : environment.observation_size]
            inputs = np.concatenate([observation, action, [reward, done]])
            np.testing.assert_allclose(rows.inputs[step], inputs, rtol=1e-5)
            row = jnp.asarray(inputs)[None]
            hidden, distribution, values = play(params, hidden, row)
            np.testing.assert_allclose(rows.values[step], values[0], rtol=1e-4, atol=1e-6)
            log_prob = distribution.log_prob(rows.actions[step][None])[0]
            np.testing.assert_allclose(rows.log_probs[step], log_prob, rtol=1e-4)
            action, reward = rows.actions[step], rows.rewards[step]
            if environment.is_discrete:
                action = np.eye(environment.action_size)[action]
            done = float(step in (3, 7))


@pytest.mark.parametrize("name", ["continuous", "ending"])
def test_a_replay_finds_the_likelihoods_of_the_trial(name):
    environment = ENVIRONMENTS.get(name) or _counter()
    problem, _, params = _setup(environment)
    trials = _experience(problem, params, _first(environment)).trials
    log_probs, values, entropies = _replay(problem, params, trials)
    counted = np.asarray(trials.mask) > 0
    np.testing.assert_allclose(log_probs[counted], trials.log_probs[counted], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(values[counted], trials.values[counted], rtol=1e-4, atol=1e-6)
    assert entropies.shape == trials.mask.shape
    # A loop that has no memory would find others.
    cut = jax.tree.map(lambda leaf: jnp.roll(leaf, -1, axis=1), trials)
    found = _replay(problem, params, cut)[1]
    assert not np.allclose(found[:, :2], trials.values[:, 1:], atol=1e-4)


def test_the_memory_rests_after_the_end_of_an_episode():
    """Two steps, then nothing until the next episode, even if the environment returns NaN."""
    environment = _counter()
    problem, learner, params = _setup(environment, discount=1.0)
    task = _first(environment)
    batch = _experience(problem, params, task)
    trials = batch.trials
    np.testing.assert_array_equal(trials.mask, np.broadcast_to([1, 1, 0, 0], (2, 3, 4)))
    np.testing.assert_array_equal(trials.returns(), np.full((2, 3), 21))
    # (reward, done) before each action that counts
    seen = np.asarray(trials.inputs)[:, :, :2, -2:].reshape(2, 6, 2)
    wanted = [[0, 0], [10, 0], [11, 1], [10, 0], [11, 1], [10, 0]]
    np.testing.assert_array_equal(seen, np.broadcast_to(wanted, (2, 6, 2)))

    # The same trial in episodes that are cut at their end. Errors of values are relative to the number
    # of steps, 12 and 6.
    cut = rl.rl_squared(problem._replace(horizon=2), value_weight=0.5 / 4)
    short = jax.tree.map(lambda leaf: leaf[:, :, :2], batch)
    grads = [
        _grad(learner, params, jaxmaml.Task((), found))
        for learner, found in ((learner, batch), (cut, short))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *grads)
    assert optax.tree.norm(grads[0]) > 1e-2
    # Where the trial is sampled in the loss, too.
    assert np.isfinite(optax.tree.norm(_grad(learner, params, task)))


def test_each_task_starts_without_a_memory():
    environment = BANDIT
    problem, learner, params = _setup(environment)
    tasks = rl.sampler(environment, num_tasks=4)(jax.random.key(0))
    found = _experiences(problem, params, tasks).trials
    # Before the first action nothing is known: it is the same in all tasks.
    assert (np.asarray(found.inputs[:, :, 0, 0]) == [1, 0, 0, 0, 0, 0]).all()
    np.testing.assert_allclose(found.values[:, :, 0, 0], found.values[0, 0, 0, 0], rtol=1e-5)
    # Later ones depend on the task.
    assert found.values[:, 0, 1, 0].std() > 1e-4

    adapted, info = learner.adapt(params, _first(environment).support, num_inner_steps=0)
    for leaf in jax.tree.leaves(adapted.memory):
        np.testing.assert_array_equal(leaf, 0)
    assert info.inner_losses.shape == (0,)


def test_adapt_trace_and_the_trial_play_the_same_episodes():
    environment = ENVIRONMENTS["discrete"]
    problem, learner, params = _setup(environment)
    task = _first(environment)
    returns = _experience(problem, params, task).trials.returns().mean(axis=0)
    adapted, info = jax.jit(learner.adapt)(params, task.support)
    np.testing.assert_allclose(info.inner_losses, -returns[:2], rtol=1e-5)
    last = jax.jit(problem.metric_fn)(adapted, task.query)
    np.testing.assert_allclose(last, returns[2], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, adapted.params, params)

    view = lambda adapted, state: (problem.metric_fn(adapted, task.query), adapted.memory.hidden)
    trace = jax.jit(lambda params, support: learner.trace(params, support, view))
    scores, hidden = trace(params, task.support)
    assert (scores.shape, hidden.shape) == ((3,), (3, 2, 6))
    np.testing.assert_allclose(scores[2], last, rtol=1e-5)
    np.testing.assert_allclose(hidden[2], adapted.memory.hidden, rtol=1e-5)
    _, info = jax.jit(learner.loss)(params, task)
    np.testing.assert_allclose([*info.inner_losses, info.query_loss], -returns, rtol=1e-5)


def test_advantages_are_those_of_the_definition():
    """One row of the steps that count, through all episodes of the trial."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 1, 3, 4))
    mask = np.array([[[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]])
    rewards = rewards * mask
    trials = rl.Trials(*map(jnp.asarray, (rewards, rewards, rewards, rewards, values, mask)))
    found = np.asarray(rl.trial_advantages(trials, discount=0.9, gae_lambda=0.7))
    assert (found[mask == 0] == 0).all()
    row, after = rewards[mask == 1], [*values[mask == 1], 0.0]
    errors = [row[t] + 0.9 * after[t + 1] - after[t] for t in range(7)]
    wanted = [sum((0.9 * 0.7) ** (k - t) * errors[k] for k in range(t, 7)) for t in range(7)]
    np.testing.assert_allclose(found[mask == 1], wanted, atol=1e-5)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_gradient_is_that_of_the_surrogate(name):
    """Central differences at other parameters than those that played, with the trials held."""
    environment = ENVIRONMENTS[name]
    options = {"clip": 10.0, "value_weight": 0.7, "entropy_weight": 0.1}
    problem, learner, params = _setup(environment, options=options)
    held = jaxmaml.Task((), _experience(problem, params, _first(environment)))
    with jax.enable_x64(True):
        double = lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf
        held, start = jax.tree.map(double, (held, params))
        direction = jax.tree.map(lambda leaf: jnp.cos(1e3 * leaf + 1), start)
        start = optax.tree.add_scale(start, 0.01, direction)
        value_and_grad = _value_and_grad_of(learner)
        grads = value_and_grad(start, held)[1]
        moved = lambda size: optax.tree.add_scale(start, size, direction)
        ends = [value_and_grad(moved(size), held)[0][0] for size in (1e-5, -1e-5)]
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(optax.tree.vdot(grads, direction), slope, rtol=1e-6)


def test_the_gradient_where_trials_were_played_is_that_of_all_trials():
    """The expected policy gradient, from all 16 trials of two arms with known rewards."""
    arms = jnp.array([0.25, 1.0])
    pull = lambda key, state, arm, task: rl.Step(state, jnp.ones(1), arms[arm], jnp.array(False))
    environment = rl.bandit(2)._replace(step=pull)
    sizes = {"num_episodes": 2, "horizon": 2, "num_trajectories": 4000}
    problem, _, params = _setup(environment, **sizes)
    problem = problem._replace(discount=1.0, gae_lambda=1.0)
    learner = rl.rl_squared(problem, value_weight=0.0)
    grads = _grad(learner, params, _first(environment))

    every = jnp.stack(jnp.meshgrid(*[jnp.arange(2)] * 4, indexing="ij"), -1).reshape(16, 2, 2)
    paid = arms[every]
    before = lambda leaf: jnp.pad(leaf.reshape(16, 4)[:, :3], ((0, 0), (1, 0)))
    hot = jax.nn.one_hot(before(every + 1) - 1, 2)
    done = jnp.broadcast_to(jnp.array([0.0, 0, 1, 0]), (16, 4))
    parts = [jnp.ones((16, 4, 1)), hot, before(paid)[..., None], done[..., None]]
    inputs = jnp.concatenate(parts, -1).reshape(16, 2, 2, 5)
    ones = jnp.ones_like(paid)
    trials = rl.Trials(inputs, every, paid, ones, ones, ones)
    counted = problem._replace(num_trajectories=16)

    @functools.partial(jax.grad, has_aux=True)
    def minus_expected(params):
        probs = jnp.exp(counted.replay(params, trials)[0].sum(axis=(1, 2)))
        return -(probs * paid.sum(axis=(1, 2))).sum() / 4, probs.sum()

    wanted, total = jax.jit(minus_expected)(params)
    np.testing.assert_allclose(total, 1, rtol=1e-5)
    assert optax.tree.norm(optax.tree.sub(grads, wanted)) < 0.1 * optax.tree.norm(wanted)


def test_a_ratio_beyond_the_clip_has_no_gradient():
    environment = BANDIT
    problem, _, params = _setup(environment)
    batch = _experience(problem, params, _first(environment))
    gains = batch._replace(advantages=jnp.ones_like(batch.advantages))
    rare = gains._replace(trials=batch.trials._replace(log_probs=batch.trials.log_probs - 1))
    learner = rl.rl_squared(problem, value_weight=0.0)
    grad = lambda batch: _grad(learner, params, jaxmaml.Task((), batch))
    assert optax.tree.norm(grad(gains)) > 1e-3
    assert optax.tree.norm(grad(rare)) == 0
    # A loss of likelihood is followed back, whatever the ratio.
    losing = rare._replace(advantages=-rare.advantages)
    assert optax.tree.norm(grad(losing)) > 1e-3


OPTIMIZERS = {"adam": optax.adam(1e-2), "ppo": rl.ppo(optax.adam(1e-2), num_epochs=2)}


@functools.cache
def _ppo_step(num_devices=None):
    """(state, metrics) of an outer step of PPO in four tasks."""
    _, learner, params = _setup(BANDIT)
    optimizer, tasks = OPTIMIZERS["ppo"], rl.sampler(BANDIT, num_tasks=4)(jax.random.key(0))
    mesh = None if num_devices is None else jaxmaml.parallel.make_mesh(num_devices)
    step = jax.jit(functools.partial(optimizer.meta_step, learner, mesh=mesh))
    return step(jaxmaml.init_state(learner, optimizer, params), tasks)


def _train(name, environment, num_outer_steps=3, mesh=None, seed=0, **sizes):
    problem, learner, params = _setup(environment, **sizes)
    start = jaxmaml.init_state(learner, OPTIMIZERS[name], params)
    source, key = rl.sampler(environment, num_tasks=4), jax.random.key(seed)
    *_, (state, metrics) = jaxmaml.fit(
        learner, OPTIMIZERS[name], start, source, num_outer_steps, key=key, mesh=mesh
    )
    return problem, learner, state, metrics


@pytest.mark.parametrize(
    ("name", "environment"),
    [pytest.param("adam", "discrete", marks=pytest.mark.slow), ("ppo", "continuous")],
)
def test_it_trains_and_is_evaluated(name, environment):
    environment = ENVIRONMENTS[environment]
    problem, learner, state, metrics = _train(name, environment)
    assert (metrics["grad_norm"] > 0).all()
    assert state.step == 3
    source, key = rl.sampler(environment, num_tasks=4), jax.random.key(1)
    score = lambda **options: jaxmaml.evaluate(
        learner, problem.metric_fn, state, source, num_tasks=5, key=key, **options
    )
    returns = score()
    assert returns.shape == (5, 3)
    np.testing.assert_allclose(score(num_inner_steps=4)[:, :3], returns, rtol=1e-4)


@pytest.mark.slow
def test_the_same_key_gives_the_same_training():
    ends = [_train("ppo", BANDIT, seed=seed)[2].params for seed in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, ends[0], ends[1])
    assert optax.tree.norm(optax.tree.sub(ends[0], ends[2])) > 1e-3


def test_the_training_does_not_depend_on_the_devices():
    ends = [jax.device_get(_ppo_step(num_devices)[0].params) for num_devices in (None, 3)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *ends)


def test_a_step_of_ppo_is_one_of_its_optimizer_for_each_epoch():
    problem, learner, params = _setup(BANDIT)
    state, metrics = _ppo_step()
    tasks = rl.sampler(BANDIT, num_tasks=4)(jax.random.key(0))
    found = _experiences(problem, params, tasks)
    advantages = found.advantages
    normalized = advantages - advantages.mean(axis=(0, 1))
    normalized = normalized / normalized.std()
    held = jaxmaml.Task((), found._replace(advantages=normalized))
    wanted, opt_state = params, optax.adam(1e-2).init(params)
    meta_grad = jax.jit(functools.partial(jaxmaml.meta_grad, learner))
    for _ in range(2):
        grads = meta_grad(wanted, held)[1]
        updates, opt_state = optax.adam(1e-2).update(grads, opt_state)
        wanted = optax.apply_updates(wanted, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, wanted)

    returns = found.trials.returns().mean(axis=(0, 1))
    names = "return_before", "return", "trial_return"
    wanted = returns[0], returns[-1], returns.sum()
    np.testing.assert_allclose([metrics[name] for name in names], wanted, rtol=1e-5)


@pytest.mark.slow
def test_it_learns_to_find_the_better_arm():
    """One arm pays: whoever has found it pulls it again. Half of the pulls pay without a memory."""

    def sample(key):
        return jax.nn.one_hot(jax.random.bernoulli(key).astype(int), 2)

    environment = rl.bandit(2)._replace(sample_task=sample)
    policy, params = rl.recurrent_policy(environment, hidden_size=8, rngs=nnx.Rngs(0))
    problem = rl.RecurrentProblem(environment, policy, num_episodes=2, horizon=1)
    learner, optimizer = rl.rl_squared(problem), rl.ppo(optax.adam(0.03))
    start = jaxmaml.init_state(learner, optimizer, params)
    source, key = rl.sampler(environment, num_tasks=64), jax.random.key(0)
    *_, (state, metrics) = jaxmaml.fit(
        learner, optimizer, start, source, 40, key=key, chunk_size=None
    )
    assert metrics["trial_return"][0] < 1.25
    returns = jaxmaml.evaluate(
        learner, problem.metric_fn, state, source, num_tasks=200, key=key, chunk_size=None
    )
    np.testing.assert_allclose(returns.mean(axis=0), [0.5, 1], atol=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _setup(BANDIT, horizon=0), "horizon must be an integer, 1 or more"),
        (
            lambda: _setup(BANDIT, num_episodes=0),
            "num_episodes must be an integer, 1 or more",
        ),
        (lambda: _setup(BANDIT, options={"clip": 0.0}), "clip must be positive; got 0.0"),
        (lambda: _setup(BANDIT, options={"value_weight": -1.0}), "value_weight must be 0"),
        (lambda: _setup(BANDIT, options={"entropy_weight": float("nan")}), "entropy_weight"),
        (
            lambda: _setup(rl.navigation_2d()._replace(observation_size=3)),
            r"observation of shape \[2\].*observation_size=3",
        ),
        (lambda: rl.ppo(optax.sgd(0.1), num_epochs=0), "num_epochs must be an integer, 1 or more"),
        (
            lambda: rl.recurrent_policy(BANDIT, hidden_size=0, rngs=nnx.Rngs(0)),
            "hidden_size must be an integer, 1 or more",
        ),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_negative_number_of_episodes_is_refused():
    _, learner, params = _setup(BANDIT)
    with pytest.raises(ValueError, match="num_inner_steps must be an integer, 0 or more"):
        learner.adapt(params, _first(BANDIT).support, num_inner_steps=-1)


def test_ppo_refuses_a_learner_without_trials():
    learner = jaxmaml.maml(lambda params, batch: jnp.sum(params), optax.sgd(0.1), 1)
    tasks = rl.sampler(BANDIT, num_tasks=2)(jax.random.key(0))
    optimizer = rl.ppo(optax.sgd(0.1))
    start = jaxmaml.init_state(learner, optimizer, jnp.ones(2))
    with pytest.raises(ValueError, match="the learner must be one of rl"):
        optimizer.meta_step(learner, start, tasks)


def test_a_memory_that_is_learned_has_the_gradient_of_the_trials_that_were_played():
    """Sampling is not differentiated, through the first memory either."""
    environment = rl.bandit(2)

    def step(params, hidden, inputs):
        hidden = jnp.tanh(hidden + inputs @ params["w"])
        return hidden, rl.Categorical(hidden[:, :2]), hidden[:, 2]

    policy = rl.RecurrentPolicy(start=lambda params: params["h0"], step=step)
    params = {"h0": jnp.array([0.1, -0.2, 0.3]), "w": 0.5 * jnp.ones((2 + 1 + 2, 3))}
    problem = rl.RecurrentProblem(environment, policy, num_trajectories=3, horizon=2)
    learner = rl.rl_squared(problem)
    task = _first(environment)
    size = problem.start(params)
    width = sum(leaf.reshape(leaf.shape[0], -1).shape[1] for leaf in jax.tree.leaves(size)[1:])
    params["w"] = 0.5 * jnp.ones((width + environment.observation_size, 3))
    held = jaxmaml.Task((), _experience(problem, params, task))
    for name, found in _grad(learner, params, task).items():
        np.testing.assert_allclose(found, _grad(learner, params, held)[name], rtol=1e-5, atol=1e-7)
