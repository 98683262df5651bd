"""Estimators of the meta-gradient against expectations that are summed over all trajectories."""

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
from jaxmaml.rl.surrogates import Inner, surrogate
from tests.rl import enumerable
from tests.rl.jitted import collect, meta_grad

SLOW = pytest.mark.slow
NAMES: tuple[Inner, ...] = ("reinforce", "lvc", "dice")


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def _learner(problem=enumerable.PROBLEM, *, inner: Inner = "reinforce", **options):
    return _learner_of(problem, inner=inner, **options)


# However its arguments are given, a learner is one object: each has programs of its own.
@functools.cache
def _learner_of(
    problem, *, inner: Inner, rate=1.0, num_inner_steps=1,
    make=jaxmaml.maml, **options,
):  # fmt: skip
    parts = rl.losses(problem, inner=inner)
    optimizer = {} if make is jaxmaml.meta_sgd else {"optimizer": optax.sgd(rate)}
    rates = {"inner_lr": rate} if make is jaxmaml.meta_sgd else {}
    return make(
        parts.loss_fn, num_inner_steps=num_inner_steps, query_loss_fn=parts.query_loss_fn,
        at_step=parts.at_step, **optimizer, **rates, **options,
    )  # fmt: skip


def _corrected(learner, problem=enumerable.PROBLEM):
    return _corrected_of(learner, problem)


@functools.cache
def _corrected_of(learner, problem):
    return rl.with_sampling_correction(problem, learner)


def _central_differences(fn, tree, size=1e-5):
    flat, unflatten = ravel_pytree(tree)
    at = jax.jit(lambda moved: fn(unflatten(moved)))
    rows = size * np.eye(len(flat))
    return np.array([(at(flat + row) - at(flat - row)) / (2 * size) for row in rows])


def _surrogate_of(name, params, batch):
    log_probs = enumerable.policy_fn(params, batch.observations).log_prob(batch.actions)
    return surrogate(name, log_probs, batch.log_probs, batch.advantages, batch.mask)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _expected(derivative, name, shift):
    """The expectation of a derivative of a surrogate over the batches of one trajectory."""
    params = jnp.asarray(enumerable.PARAMS)
    batches, log_probs = enumerable.experiences(enumerable.PROBLEM, params)
    batches = batches._replace(advantages=batches.advantages - shift)
    found = jax.vmap(lambda batch: derivative(_surrogate_of, 1)(name, params, batch))(batches)
    return jnp.tensordot(jnp.exp(log_probs), found, 1)


def _outer(first, second):
    return jnp.tensordot(first, second, 0)


# The surrogates.


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_a_surrogate_is_that_of_the_expected_return(name):
    """A mean over steps, so that it is smaller by the horizon."""
    params = jnp.asarray(enumerable.PARAMS)
    wanted = _central_differences(enumerable.value, params).reshape(2, 2) / enumerable.HORIZON
    np.testing.assert_allclose(_expected(jax.grad, name, 0.0), wanted, atol=1e-9)
    np.testing.assert_allclose(_expected(jax.grad, name, 3.0), wanted, atol=1e-9)


@pytest.mark.parametrize("name", ["lvc", "dice"])
def test_surrogates_have_the_same_gradient_on_every_batch(name):
    params = jnp.asarray(enumerable.PARAMS)
    batches, _ = enumerable.experiences(enumerable.PROBLEM, params, 2)
    grads = [
        jax.jit(jax.vmap(jax.grad(functools.partial(_surrogate_of, kind)), (None, 0)))(
            params, batches
        )
        for kind in (name, "reinforce")
    ]
    np.testing.assert_allclose(*grads, atol=1e-12)
    assert np.abs(grads[0]).max() > 0.1


def test_the_hessian_of_dice_is_that_of_the_expected_return_and_the_others_leave_terms_out():
    params = jnp.asarray(enumerable.PARAMS)
    whole = jax.jit(jax.hessian(enumerable.value))(params)
    by_differences = _central_differences(jax.grad(lambda x: enumerable.value(x)), params)
    np.testing.assert_allclose(whole.reshape(4, 4), by_differences.reshape(4, 4), atol=1e-8)

    # The score of an action times the derivative of the expected return after it.
    policy = jax.nn.softmax(params, axis=1)
    scores = jax.jit(jax.jacobian(jax.nn.log_softmax))(params)  # state, action, then parameters
    later = jax.jit(jax.jacobian(enumerable.later_values))(params)
    cross = jnp.einsum("a,aij,akl->ijkl", policy[0], scores[0], later)
    without_cross = whole - cross - cross.transpose(2, 3, 0, 1)

    # The square of the score times the expected return after the action, over states and actions.
    reached = [np.array([1.0, 0.0]), policy[0] @ enumerable.TRANSITIONS[0]]
    returns = [jnp.stack([enumerable.later_values(params)] * 2), jnp.asarray(enumerable.REWARDS)]
    squares = sum(
        reached[t][s] * policy[s, a] * returns[t][s, a] * _outer(scores[s, a], scores[s, a])
        for t in range(2)
        for s in range(2)
        for a in range(2)
    )

    wanted = {"dice": whole, "lvc": without_cross, "reinforce": without_cross - squares}
    assert np.abs(cross).max() > 0.01
    assert np.abs(squares).max() > 0.01
    for name, hessian in wanted.items():
        found = enumerable.HORIZON * _expected(jax.hessian, name, 0.0)
        np.testing.assert_allclose(found, hessian, atol=1e-9, err_msg=name)


def test_the_hessian_of_dice_has_no_bias_with_a_baseline():
    whole = _expected(jax.hessian, "dice", 0.0)
    np.testing.assert_allclose(_expected(jax.hessian, "dice", 3.0), whole, atol=1e-12)


def test_the_score_of_the_trajectories_completes_the_hessian_of_reinforce():
    """The correction of E-MAML, for the policy gradient in place of the return."""
    params = jnp.asarray(enumerable.PARAMS)
    batches, log_probs = enumerable.experiences(enumerable.PROBLEM, params)
    of_batch = jax.grad(functools.partial(_surrogate_of, "reinforce"))
    grad = jax.jit(jax.vmap(of_batch, (None, 0)))
    scores = jax.jit(jax.jacobian(lambda params: enumerable.listed(params).log_probs))(params)
    missing = jnp.einsum("b,bij,bkl->ijkl", jnp.exp(log_probs), grad(params, batches), scores)
    found = _expected(jax.hessian, "reinforce", 0.0) + missing
    wanted = jax.jit(jax.hessian(enumerable.value))(params) / enumerable.HORIZON
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_dice_is_the_objective_of_the_paper():
    """The reward of a step times the magic box of all actions up to it."""
    params = jnp.asarray(enumerable.PARAMS)
    batches, _ = enumerable.experiences(enumerable.PROBLEM, params)
    rewards = enumerable.listed(params).found.rewards

    def paper(params, batch, rewards):
        log_probs = enumerable.policy_fn(params, batch.observations).log_prob(batch.actions)
        up_to = jnp.cumsum(log_probs, axis=1)
        return (jnp.exp(up_to - jax.lax.stop_gradient(up_to)) * rewards).mean()

    ours = functools.partial(_surrogate_of, "dice")
    for derivative in (jax.grad, jax.hessian):
        found = jax.jit(jax.vmap(derivative(ours), (None, 0)))(params, batches)
        wanted = jax.jit(jax.vmap(derivative(paper), (None, 0, 0)))(params, batches, rewards)
        np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_steps_after_the_end_have_no_part_in_a_surrogate(name):
    """The derivatives are those of the trajectory that is cut."""
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(3, 1, 4)))
    mask = jnp.array([[1.0, 1.0, 0.0, 0.0]])

    def fn(x, cut):
        log_probs = jnp.sin(x * rows[0])[:, :cut]
        return surrogate(
            name, log_probs, rows[1, :, :cut], (rows[2] * mask)[:, :cut], mask[:, :cut]
        )

    for derivative in (jax.grad, jax.hessian):
        at = jax.jit(derivative(fn), static_argnums=1)
        np.testing.assert_allclose(at(0.7, 4), at(0.7, 2), rtol=1e-12)
        assert abs(at(0.7, 2)) > 1e-4


# The meta-gradients.


CASES = {
    "one step": {},
    "two steps": {"num_inner_steps": 2},
    "two trajectories": {"num_trajectories": 2},
    "normalized": {"num_trajectories": 2, "normalize": True, "baseline": "linear"},
    "learned rates": {"num_inner_steps": 2, "make": jaxmaml.meta_sgd},
    "reverse": {"num_inner_steps": 2, "adjoint": jaxmaml.Exact(mode="reverse")},
}


SLOW_CASES = ("two steps", "two trajectories", "reverse")
"""They are contained in "learned rates", "normalized" and the tests of adjoints."""


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=SLOW if case in SLOW_CASES else ()) for case in CASES],
)
def test_the_corrected_meta_gradient_is_that_of_the_expected_return_after_adaptation(case):
    settings = dict(CASES[case])
    sizes = settings.get("num_inner_steps", 1), settings.pop("num_trajectories", 1)
    chosen = {name: settings.pop(name) for name in ("normalize", "baseline") if name in settings}
    problem = enumerable.PROBLEM._replace(**chosen)
    learner = _learner(problem, **settings)
    meta_params = learner.init(jnp.asarray(enumerable.PARAMS))

    expected_return = lambda params: enumerable.expected_return(problem, learner, params, *sizes)
    wanted = -_central_differences(expected_return, meta_params) / enumerable.HORIZON
    gradient = functools.partial(enumerable.expected_gradient, problem)
    corrected = ravel_pytree(gradient(_corrected(learner, problem), meta_params, *sizes))[0]
    np.testing.assert_allclose(corrected, wanted, rtol=1e-6, atol=1e-9)
    # Without the correction it is another one.
    plain = ravel_pytree(gradient(learner, meta_params, *sizes))[0]
    assert np.abs(plain - wanted).max() > 3e-3


@pytest.mark.parametrize(
    "inner", ["reinforce", pytest.param("lvc", marks=SLOW), pytest.param("dice", marks=SLOW)]
)
def test_the_uncorrected_meta_gradient_leaves_out_the_score_of_the_support(inner):
    params, learner = jnp.asarray(enumerable.PARAMS), _learner(inner=inner)
    found = enumerable.supports(enumerable.PROBLEM, learner, params, 1)
    returns = found.probs * jax.vmap(enumerable.value)(found.adapted)
    left_out = jax.jit(jax.grad(lambda params: returns @ enumerable.listed(params).log_probs))(
        params
    )
    plain, corrected = (
        enumerable.expected_gradient(enumerable.PROBLEM, one, params)
        for one in (learner, _corrected(learner))
    )
    np.testing.assert_allclose(
        corrected - plain, -left_out / enumerable.HORIZON, rtol=1e-9, atol=1e-12
    )
    # What is left is the derivative through the inner gradient.
    jacobian = jax.jacobian(lambda params, support: learner.adapt(params, support)[0])
    jacobians = jax.jit(jax.vmap(jacobian, (None, 0)))(params, found.support)
    slopes = jax.jit(jax.vmap(jax.grad(enumerable.value)))(found.adapted)
    through = jnp.einsum("b,bijkl,bij->kl", found.probs, jacobians, slopes)
    np.testing.assert_allclose(plain, -through / enumerable.HORIZON, rtol=1e-9, atol=1e-12)


def _bias(rate, corrected=False, inner: Inner = "reinforce"):
    """The distance of the expected meta-gradient from the derivative of the sampled objective."""
    params = jnp.asarray(enumerable.PARAMS)
    learner = _learner(rate=rate, inner=inner)
    learner = _corrected(learner) if corrected else learner
    return np.linalg.norm(
        enumerable.expected_gradient(enumerable.PROBLEM, learner, params) - _wanted(rate)
    )


@functools.cache
def _wanted(rate):
    """The derivative of the expected return after one step of REINFORCE."""
    params = jnp.asarray(enumerable.PARAMS)
    objective = functools.partial(
        enumerable.expected_return, enumerable.PROBLEM, _learner(rate=rate)
    )
    return jax.jit(jax.grad(objective))(params) / -enumerable.HORIZON


@pytest.mark.parametrize(
    ("order", "settings"),
    [
        (1, {"inner": "reinforce"}),
        pytest.param(1, {"inner": "lvc"}, marks=SLOW),
        (2, {"inner": "dice"}),
        # What dice contains counts twice.
        pytest.param(1, {"inner": "dice", "corrected": True}, marks=SLOW),
    ],
)
def test_the_bias_has_the_order_in_the_inner_rate_that_is_documented(order, settings):
    large, small = _bias(1e-2, **settings), _bias(1e-3, **settings)
    assert np.log10(large / small) == pytest.approx(order, abs=0.05)
    assert small > 1e-9


@pytest.mark.parametrize("num_inner_steps", [pytest.param(1, marks=SLOW), 2])
def test_the_first_order_correction_takes_the_inner_gradients_as_constants(num_inner_steps):
    """Both terms with the identity as the derivative of the parameters of each step."""
    params = jnp.asarray(enumerable.PARAMS)
    learner = _learner(num_inner_steps=num_inner_steps, make=jaxmaml.fomaml)
    found = enumerable.supports(enumerable.PROBLEM, learner, params, num_inner_steps)

    def objective(shift):
        total = jax.vmap(lambda adapted: enumerable.value(adapted + shift))(found.adapted)
        for step in range(num_inner_steps):
            at = jax.vmap(
                lambda one, step=step: learner.adapt(params, one, num_inner_steps=step)[0]
            )
            batch = jax.tree.map(lambda leaf, step=step: leaf[:, step], found.support)
            log_probs = jax.vmap(
                lambda params, one: (
                    enumerable.policy_fn(params, one.observations).log_prob(one.actions).sum()
                )
            )(at(found.support) + shift, batch)
            total += log_probs * jax.vmap(enumerable.value)(found.adapted)
        return found.probs @ total

    wanted = -jax.jit(jax.grad(objective))(jnp.zeros_like(params)) / enumerable.HORIZON
    corrected = enumerable.expected_gradient(
        enumerable.PROBLEM, _corrected(learner), params, num_inner_steps
    )
    np.testing.assert_allclose(corrected, wanted, rtol=1e-9, atol=1e-12)


# The correction as a function of its batches.


@functools.cache
def _sampled(num_inner_steps=1, **sizes):
    problem = enumerable.PROBLEM._replace(**{"num_trajectories": 4, "horizon": 3, **sizes})
    learner, params = _learner(problem, num_inner_steps=num_inner_steps), jnp.eye(2)
    keys = jax.random.split(jax.random.key(0), (2, 3))
    requests = jax.vmap(lambda key: rl.Request(key, enumerable.task()))
    tasks = jaxmaml.Task(requests(keys[0]), requests(keys[1]))
    return problem, learner, params, tasks


def test_requests_are_sampled_once():
    """The meta-gradient is that of the batches which `collect` returns."""
    problem, learner, params, tasks = _sampled()
    corrected = _corrected(learner, problem)
    collected = collect(problem, learner, params, tasks)
    found, wanted = (meta_grad(corrected, params, x) for x in (tasks, collected))
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-9)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-9)
    # Where the batches were sampled, the correction is 0 in value.
    np.testing.assert_allclose(found[0], found[2].query_loss.mean(), rtol=1e-9)


def test_the_mean_over_samples_is_the_expectation():
    """Requests, the environment and the corrected loss together, within four standard errors."""
    problem = enumerable.PROBLEM
    learner, params = _corrected(_learner()), jnp.asarray(enumerable.PARAMS)
    keys = jax.random.split(jax.random.key(0), (20_000, 2))

    def gradient(keys):
        support, query = (rl.Request(key, enumerable.task()) for key in keys)
        return jax.grad(learner.loss, has_aux=True)(params, jaxmaml.Task(support, query))[0]

    found = jax.jit(jax.vmap(gradient))(keys)
    wanted = enumerable.expected_gradient(problem, learner, params)
    errors = found.std(axis=0) / np.sqrt(len(keys))
    assert (np.abs(found.mean(axis=0) - wanted) < 4 * errors).all()
    assert errors.max() < 0.02


def test_a_constant_in_all_returns_has_no_effect():
    """The control variate: the other trajectories of the support have it too."""
    problem, learner, params, tasks = _sampled()
    batches = collect(problem, learner, params, tasks)
    raised = jaxmaml.Task(*(batch._replace(rewards=batch.rewards + 5) for batch in batches))
    corrected = _corrected(learner, problem)
    grads = [meta_grad(corrected, params, x)[1] for x in (batches, raised)]
    np.testing.assert_allclose(*grads, rtol=1e-9)
    # A constant in the returns of the query alone has one.
    query = batches.query._replace(rewards=batches.query.rewards + 5)
    moved = meta_grad(corrected, params, batches._replace(query=query))[1]
    assert np.abs(moved - grads[0]).max() > 0.1


def test_normalized_advantages_of_the_query_have_the_units_of_the_reward():
    """Rewards ten times as large make the meta-gradient ten times as large."""
    problem, learner, params, tasks = _sampled(normalize=True, baseline="linear")
    batches = collect(problem, learner, params, tasks)
    query, support = batches.query, batches.support
    larger = jaxmaml.Task(
        support._replace(rewards=10 * support.rewards),
        query._replace(rewards=10 * query.rewards, scale=10 * query.scale),
    )
    corrected = _corrected(learner, problem)
    grads = [meta_grad(corrected, params, x)[1] for x in (batches, larger)]
    np.testing.assert_allclose(10 * grads[0], grads[1], rtol=1e-9)
    raw = problem._replace(normalize=False)
    found = problem.sample(params, jax.tree.map(lambda leaf: leaf[0], tasks.query))
    normal, plain = (one.score(params, found) for one in (problem, raw))
    centered = plain.advantages - plain.advantages.mean()
    np.testing.assert_allclose(normal.advantages * normal.scale, centered, atol=1e-12)
    assert float(plain.scale) == 1


def test_steps_after_the_end_have_no_part_in_the_correction():
    problem, learner, params, tasks = _sampled()
    batches = collect(problem, learner, params, tasks)
    ended = jaxmaml.Task(*(batch._replace(mask=batch.mask.at[..., 2].set(0)) for batch in batches))
    other = ended.support._replace(actions=ended.support.actions.at[..., 2].set(1))
    assert (other.actions != ended.support.actions).any()
    corrected = _corrected(learner, problem)
    grads = [meta_grad(corrected, params, x)[1] for x in (ended, ended._replace(support=other))]
    np.testing.assert_allclose(*grads, rtol=1e-9)
    assert np.abs(grads[0]).max() > 1e-3


@SLOW
def test_trpo_takes_a_corrected_learner():
    problem, _, params, tasks = _sampled()
    learner = _learner(problem, adjoint=jaxmaml.Exact(mode="reverse"))
    corrected, optimizer = _corrected(learner, problem), rl.trpo(problem)
    batches = collect(problem, learner, params, tasks)
    state = jaxmaml.init_state(corrected, optimizer, params)
    step = jax.jit(functools.partial(optimizer.meta_step, corrected, chunk_size=None))
    _, metrics = step(state, tasks)
    norm = optax.tree.norm(meta_grad(corrected, params, batches)[1])
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-9)
    assert metrics["accepted"]


@SLOW
def test_the_corrected_meta_gradient_does_not_depend_on_the_devices():
    problem, learner, params, tasks = _sampled()
    corrected = _corrected(learner, problem)
    mesh = jaxmaml.parallel.make_mesh(2)
    grads = [
        jax.device_get(meta_grad(corrected, params, tasks, mesh=one)[1]) for one in (None, mesh)
    ]
    np.testing.assert_allclose(*grads, rtol=1e-9)


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda parts, **o: jaxmaml.maml(parts.loss_fn, optax.sgd(0.1), 1, **o,
            query_weights=jnp.ones(1)), "with query_weights"),
        (lambda parts, **o: jaxmaml.maml(parts.loss_fn, optax.sgd(0.1), 1, **o,
            test_loss_fn=parts.loss_fn), "with test_loss_fn"),
        (lambda parts, **o: jaxmaml.maml(parts.loss_fn, optax.sgd(0.1), 1, **o,
            adjoint=jaxmaml.Annealed(jaxmaml.FirstOrder(), jaxmaml.Exact(), at=3)),
            "with an annealed adjoint"),
        (lambda parts, **o: jaxmaml.protonet(parts.loss_fn, lambda params, batch: batch),
            "no inner loop of jaxmaml"),
    ],
)  # fmt: skip
def test_a_learner_with_another_meta_loss_is_refused(make, message):
    parts = rl.losses(enumerable.PROBLEM)
    options = {"query_loss_fn": parts.query_loss_fn, "at_step": parts.at_step}
    with pytest.raises(ValueError, match=message):
        _corrected(make(parts, **options))


def test_batches_of_two_kinds_or_of_too_few_steps_are_refused():
    problem, learner, params, tasks = _sampled()
    corrected = _corrected(learner, problem)
    batches = collect(problem, learner, params, tasks)
    with pytest.raises(TypeError, match="must both be a Request, or both an Experience"):
        meta_grad(corrected, params, batches._replace(query=tasks.query))
    longer = _corrected(_learner(problem, num_inner_steps=2), problem)
    with pytest.raises(ValueError, match="a batch for each of the 2 inner steps"):
        meta_grad(longer, params, batches)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="inner must be"):
        rl.losses(enumerable.PROBLEM, inner="ratio")  # pyright: ignore[reportArgumentType]
    ones = jnp.ones((1, 1))
    with pytest.raises(ValueError, match="name must be"):
        surrogate("ratio", ones, ones, ones, ones)  # pyright: ignore[reportArgumentType]
    problem = enumerable.PROBLEM._replace(baseline="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="baseline must be"):
        problem.score(jnp.eye(2), enumerable.listed(jnp.eye(2)).found)


def test_the_meta_gradient_of_dice_is_finite_in_single_precision():
    """A Gaussian policy over many steps, whose likelihood as a whole would underflow."""
    with jax.enable_x64(False):
        environment = rl.navigation_2d()
        policy_fn, params = rl.policy(environment, hidden_sizes=(4,), rngs=nnx.Rngs(0))
        problem = rl.Problem(environment, policy_fn, num_trajectories=3, horizon=100)
        learner = _learner(problem, inner="dice", rate=0.1)
        corrected = _corrected(learner, problem)
        tasks = rl.sampler(environment, num_tasks=2)(jax.random.key(0))
        batches = collect(problem, learner, params, tasks)
        assert batches.support.log_probs.sum(axis=-1).max() < -110
        loss, grads, info = meta_grad(corrected, params, batches)
        assert np.isfinite(optax.tree.norm(grads))
        assert optax.tree.norm(grads) > 1e-3
        # The likelihoods are those that they were sampled with.
        wanted = (batches.query.scale * info.query_loss).mean()
        np.testing.assert_allclose(loss, wanted, atol=1e-3)
