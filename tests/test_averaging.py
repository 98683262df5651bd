"""The average follows the parameters, and training does not change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmaml.averaging import AveragingState, averaged, with_average
from jaxmaml.types import MetaState


def _descend(optimizer, num_steps):
    """(parameters after every step, the last state) of a descent on w**2 from 1."""
    params: Any = jnp.array([1.0, -2.0])
    path = []
    opt_state = optimizer.init(params)
    for _ in range(num_steps):
        updates, opt_state = optimizer.update(2 * params, opt_state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path, MetaState(params, opt_state, jnp.asarray(num_steps), ())


def test_training_is_the_same():
    plain, _ = _descend(optax.adam(0.1), 5)
    with_one, _ = _descend(with_average(optax.adam(0.1), 0.9), 5)
    np.testing.assert_array_equal(plain, with_one)


def test_the_average_is_that_of_the_path():
    path, state = _descend(with_average(optax.sgd(0.1), 0.5), 40)
    expected = jnp.array([1.0, -2.0])
    for t, params in enumerate(path):
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * params
    np.testing.assert_allclose(averaged(state).params, expected, rtol=1e-6)


def test_a_short_run_forgets_the_initial_parameters():
    path, state = _descend(with_average(optax.sgd(0.1), 0.99), 10)
    ends = jnp.array([1.0, -2.0]), path[-1]
    distance = [float(jnp.abs(averaged(state).params - end).sum()) for end in ends]
    assert distance[1] < 0.5 * distance[0]


@pytest.mark.parametrize("optimizer", [with_average(optax.sgd(0.1), 0.0), optax.sgd(0.1)])
def test_without_an_average_the_last_parameters_are_evaluated(optimizer):
    path, state = _descend(optimizer, 3)
    np.testing.assert_array_equal(averaged(state).params, path[-1])


def test_half_precision_is_averaged_in_float32_and_evaluated_in_its_own():
    params: Any = jnp.array([1.0], jnp.bfloat16)
    optimizer = with_average(optax.sgd(1e-3), 0.99)
    state = optimizer.init(params)
    for _ in range(3):
        _, after = optimizer.update(jnp.ones_like(params), state, params)
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), state, after)
        state = after
    assert isinstance(state, AveragingState)
    assert state.average.dtype == jnp.float32
    evaluated = averaged(MetaState(params, state, jnp.array(3), ())).params
    assert evaluated.dtype == jnp.bfloat16


def test_what_an_optimizer_is_told_beside_the_gradient_reaches_it():
    seen = []

    def update(updates, state, params=None, *, value, **extra):
        seen.append(value)
        return updates, state

    told: Any = optax.GradientTransformationExtraArgs(lambda params: (), update)  # pyright: ignore
    optimizer: Any = with_average(told, 0.9)
    params = jnp.zeros(2)
    optimizer.update(params, optimizer.init(params), params, value=3.0)
    assert seen == [3.0]


@pytest.mark.parametrize(
    "around",
    [
        lambda inner: optax.chain(optax.clip_by_global_norm(1.0), inner),
        lambda inner: optax.apply_if_finite(inner, 3),
        lambda inner: optax.MultiSteps(inner, 2).gradient_transformation(),
    ],
    ids=["chain", "apply_if_finite", "MultiSteps"],
)
def test_an_average_within_another_transformation_is_refused(around):
    _, meta_state = _descend(around(with_average(optax.sgd(0.1), 0.9)), 2)
    with pytest.raises(ValueError, match="must be the outermost part"):
        averaged(meta_state)
