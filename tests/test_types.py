"""The two forms of a function, with state and without."""

from typing import Any

import jax.numpy as jnp
import optax
import pytest

import jaxmaml
from jaxmaml.types import as_stateful, carries_state, in_form_of

PLAIN = lambda params, batch: params + batch
STATEFUL = jaxmaml.with_state(lambda params, batch, state: (params + batch, state + 1))


def test_the_core_computes_with_one_form():
    assert as_stateful(PLAIN)(1, 2, "state") == (3, "state")
    assert as_stateful(STATEFUL)(1, 2, 5) == (3, 6)


def test_a_function_made_of_another_has_its_form():
    def double(of) -> Any:
        return in_form_of(of, lambda p, b, s: (2 * as_stateful(of)(p, b, s)[0], s))

    assert double(PLAIN)(1, 2) == 6
    assert not carries_state(double(PLAIN))
    assert double(STATEFUL)(1, 2, 0) == (6, 0)
    assert carries_state(double(STATEFUL))


def test_marking_twice_is_marking_once():
    assert jaxmaml.with_state(STATEFUL) is STATEFUL
    assert jaxmaml.with_state(STATEFUL.fn) == STATEFUL


def test_a_pair_from_a_loss_that_is_not_marked_is_refused():
    learner = jaxmaml.maml(lambda params, batch: (params, 0), optax.sgd(0.1), 1)
    with pytest.raises(TypeError, match=r"jaxmaml\.with_state"):
        learner.adapt(jnp.array(0.0), jnp.ones(2))


def test_a_loss_of_three_arguments_that_is_not_marked_is_refused():
    learner = jaxmaml.maml(lambda params, batch, state: (params, state), optax.sgd(0.1), 1)
    with pytest.raises(TypeError, match=r"marked with jaxmaml\.with_state; got <lambda>\(params"):
        learner.adapt(jnp.array(0.0), jnp.ones(2))


def test_marking_a_function_of_two_arguments_is_refused():
    with pytest.raises(
        TypeError, match=r"with_state marks a function \(params, batch, state\); got"
    ):
        jaxmaml.with_state(lambda params, batch: params)  # type: ignore[arg-type]


def test_a_function_whose_arguments_nobody_knows_is_taken():
    assert as_stateful(lambda *args: len(args))(0, 0, "state") == (2, "state")
    assert as_stateful(max)(1, 2, ()) == (2, ())
