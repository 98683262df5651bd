"""The first value that is not finite, wherever it comes from."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from bowls import FIRST, PARAMS, RATE, TASK, curved, curved_loss

import jaxmaml
from jaxmaml import diagnostics
from jaxmaml.types import Task


def _zero_input(task):
    """The second number of each example is always 0, and so is the second inner gradient."""
    return jax.tree.map(lambda leaf: leaf * jnp.array([[1.0, 0.0]]), task)


def _breaks(which, value=math.nan):
    """PARAMS and TASK with one number that is not finite in one of them."""
    path = {"body": {"w": jnp.array([5.0, value])}}
    batch = getattr(TASK, which, TASK.query).at[1, 0].set(value)
    changed = {"support": TASK._replace(support=batch), "query": TASK._replace(query=batch)}
    return (PARAMS | path, TASK) if which == "params" else (PARAMS, changed[which])


def _linear_loss(params, batch):
    return jnp.mean((batch @ params["body"]["w"] + jnp.sum(params["head"]["w"]) - 1) ** 2)


def _nan_rate_at(step):
    return optax.sgd(lambda count: jnp.where(count == step, jnp.nan, RATE))


def _broken_meta_loss():
    plain = curved(2)

    def loss(*args, **options):
        value, info = plain.loss(*args, **options)
        return value * jnp.inf, info

    return plain._replace(loss=loss)


@jax.custom_jvp
def _without_derivative(update):
    return update


@_without_derivative.defjvp
def _nan_derivative(primals, tangents):
    return primals[0], tangents[0] * jnp.nan


def _broken_update(num_inner_steps, **options):
    """Finite losses and updates, whose derivative is NaN."""
    update = lambda updates, params: jax.tree.map(lambda u: -0.1 * _without_derivative(u), updates)
    return jaxmaml.maml(_linear_loss, optax.stateless(update), num_inner_steps, **options)


_LOG = lambda params, batch: jnp.log(-jnp.sum(params["body"]["w"] ** 2)) + 0 * jnp.sum(batch)
_THREE = curved(3)
FAILURES = {
    "healthy": (_THREE, PARAMS, TASK, None),
    "no steps": (curved(0), PARAMS, TASK, None),
    "params": (_THREE, *_breaks("params"), "meta-parameter body/w"),
    "infinite params": (_THREE, *_breaks("params", math.inf), "meta-parameter body/w"),
    "support": (_THREE, *_breaks("support"), "support"),
    "query": (_THREE, *_breaks("query", -math.inf), "query"),
    "rate": (
        jaxmaml.maml(curved_loss, _nan_rate_at(2), 4), PARAMS, TASK, "inner step 3: parameter body/w",
    ),
    # Parameters of 1e30 are finite, their squares are not.
    "divergence": (curved(3, rate=1e30), PARAMS, TASK, "inner step 2: loss"),
    "loss": (jaxmaml.maml(_LOG, optax.sgd(RATE), 2), PARAMS, TASK, "inner step 1: loss"),
    "query loss": (curved(2, query_loss_fn=_LOG), PARAMS, TASK, "query loss"),
    "query loss, no steps": (curved(0, query_loss_fn=_LOG), PARAMS, TASK, "query loss"),
    "meta-loss": (_broken_meta_loss(), PARAMS, TASK, "meta-loss"),
    "derivative": (_broken_update(2), PARAMS, TASK, "meta-gradient body/w"),
    "derivative, one step": (_broken_update(1), PARAMS, TASK, "meta-gradient body/w"),
    "derivative, first order": (_broken_update(2, adjoint=FIRST), PARAMS, TASK, None),
    "adam where a gradient is zero": (
        jaxmaml.maml(_linear_loss, optax.adam(0.1), 2), PARAMS, _zero_input(TASK), None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("learner", "params", "task", "place"), FAILURES.values(), ids=FAILURES)
def test_where_the_first_nonfinite_number_is(learner, params, task, place):
    assert diagnostics.first_nonfinite(learner, params, task) == place


def test_the_loss_shows_nothing_of_a_derivative_that_is_nan():
    loss, info = _broken_update(2).loss(PARAMS, TASK)
    assert jnp.isfinite(loss)
    assert jnp.isfinite(info.inner_losses).all()


def test_a_bare_array_a_key_and_an_integer_may_be_looked_at():
    loss_fn = lambda params, batch: jnp.mean((params - batch["x"]) ** 2)
    learner = jaxmaml.maml(loss_fn, optax.sgd(RATE), 1)
    batch = {"x": jnp.ones(2), "key": jax.random.key(0), "label": jnp.array([1, 2])}
    find = lambda params: diagnostics.first_nonfinite(learner, params, Task(batch, batch))
    assert find(jnp.array(0.0)) is None
    assert find(jnp.array(jnp.nan)) == "meta-parameter"


@pytest.mark.parametrize(
    ("state", "place"),
    [(1.0, "inner step 2: state scale"), (math.nan, "state scale"), (0.0, None)],
)
def test_a_state_that_grows_beyond_all_numbers_is_found(state, place):
    @jaxmaml.with_state
    def loss_fn(params, batch, state):
        return curved_loss(params, batch), {"scale": state["scale"] * 1e30}

    learner = curved(3, loss_fn=loss_fn)
    state = {"scale": jnp.array(state)}
    assert diagnostics.first_nonfinite(learner, PARAMS, TASK, state=state) == place


def test_the_outer_step_reaches_the_learner():
    plain = curved(1)

    def loss(meta_params, task, *, step=0, state=()):
        value, info = plain.loss(meta_params, task, state=state)
        return jnp.where(step > 10, jnp.nan, value), info

    learner = plain._replace(loss=loss)
    assert diagnostics.first_nonfinite(learner, PARAMS, TASK, step=10) is None
    assert diagnostics.first_nonfinite(learner, PARAMS, TASK, step=11) == "meta-loss"


def test_a_learner_that_starts_from_what_is_not_finite():
    plain = curved(1)
    exp = lambda params: jax.tree.map(lambda leaf: jnp.exp(100 * leaf), params)
    learner = plain._replace(
        trace=lambda params, *args, **options: plain.trace(exp(params), *args, **options)
    )
    place = "before the first inner step: parameter body/w"
    assert diagnostics.first_nonfinite(learner, PARAMS, TASK) == place


def test_the_loss_of_the_test_is_not_looked_at():
    """It is not part of the meta-gradient."""
    loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
    broken = lambda params, batch: loss_fn(params, batch) + jnp.nan * params.sum()
    task = Task(jnp.ones(2), jnp.ones(2))
    for losses, place in (((loss_fn, broken), None), ((broken, loss_fn), "inner step 1: loss")):
        learner = jaxmaml.maml(losses[0], optax.sgd(RATE), 1, test_loss_fn=losses[1])
        assert diagnostics.first_nonfinite(learner, jnp.zeros(2), task) == place


def test_jax_debug_nans_does_not_stop_the_search():
    with jax.debug_nans(True):
        place = diagnostics.first_nonfinite(_broken_update(2), PARAMS, TASK)
    assert place == "meta-gradient body/w"
