"""Agreement of gradients against closed forms."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from bowls import (
    CURVATURE,
    FIRST,
    PARAMS,
    RATE,
    TASK,
    curved,
    curved_after,
    curved_loss,
)

import jaxmaml
from jaxmaml import diagnostics


@pytest.mark.parametrize(
    ("grads", "reference", "cosine", "ratio"),
    [
        ([3.0, 4.0], [0.0, 10.0], 0.8, 0.5),
        ([-1.0, 0.0], [2.0, 0.0], -1.0, 0.5),
        ([0.0, 0.0], [2.0, 0.0], math.nan, 0.0),
        ([2.0, 0.0], [0.0, 0.0], math.nan, math.inf),
        ([0.0, 0.0], [0.0, 0.0], math.nan, math.nan),
    ],
)
def test_agreement_of_a_tree_and_of_its_layers(grads, reference, cosine, ratio):
    grads, reference = ({"a": {"w": jnp.array(value)}} for value in (grads, reference))
    np.testing.assert_allclose(diagnostics.agreement(grads, reference), (cosine, ratio))
    steady = {"b": [jnp.array([1.0, 1.0])]}
    layers = diagnostics.agreement_by_layer(grads | steady, reference | steady)
    np.testing.assert_allclose(layers["a"], (cosine, ratio))
    np.testing.assert_allclose(layers["b"], (1, 1), rtol=1e-6)


@pytest.mark.parametrize("depth", [0, -1, 1.0, True])
def test_a_depth_below_one_is_refused(depth):
    with pytest.raises((ValueError, TypeError), match="depth must be an integer, 1 or more"):
        diagnostics.agreement_by_layer(PARAMS, PARAMS, depth=depth)


def test_trees_of_different_structure_do_not_agree():
    with pytest.raises(ValueError, match="same structure"):
        diagnostics.agreement_by_layer(PARAMS, {"body": PARAMS["body"]})


def test_agreement_by_step_in_closed_form():
    """d theta_n / d theta is (1 - rate * curvature)^n, which first order leaves out."""
    numbers = (0, 1, 4)
    exact, first = curved, functools.partial(curved, adjoint=FIRST)
    whole, layers = diagnostics.agreement_by_step(first, exact, PARAMS, TASK, numbers)
    for i, number in enumerate(numbers):
        query_mean = np.array([1.0, 3.0])
        grads = {x: CURVATURE[x] * (curved_after(x, number) - query_mean) for x in CURVATURE}
        shrink = {x: (1 - RATE * CURVATURE[x]) ** number for x in CURVATURE}
        reference = np.concatenate([shrink[x] * grads[x] for x in CURVATURE])
        joined = np.concatenate(list(grads.values()))
        norms = np.linalg.norm(joined), np.linalg.norm(reference)
        expected = joined @ reference / math.prod(norms), norms[0] / norms[1]
        np.testing.assert_allclose([leaf[i] for leaf in whole], expected, rtol=1e-5)
        for layer in CURVATURE:
            found = [leaf[i] for leaf in layers[layer]]
            np.testing.assert_allclose(found, (1, 1 / shrink[layer]), rtol=1e-5)


def test_a_layer_that_exact_maml_does_not_learn_has_no_direction():
    """At a rate of 1 / curvature one step lands in the minimum wherever it started."""
    exact = functools.partial(curved, rate=0.25)
    first = functools.partial(exact, adjoint=FIRST)
    # Of two examples, so that their mean is exact and the gradient zero, not its rounding.
    task = TASK._replace(support=TASK.support[:2])
    _, layers = diagnostics.agreement_by_step(first, exact, PARAMS, task, (1,), depth=1)
    np.testing.assert_allclose(layers["head"], [[math.nan], [math.inf]])
    np.testing.assert_allclose(layers["body"], [[1.0], [1 / 0.75]], rtol=1e-6)


def test_state_and_depth_reach_the_agreement_by_step():
    """A state of 2 doubles the curvature, and two layers of one part are one."""

    @jaxmaml.with_state
    def loss_fn(params, batch, state):
        return state * curved_loss(params["part"], batch), state

    exact = functools.partial(curved, rate=RATE / 2, loss_fn=loss_fn)
    first = functools.partial(exact, adjoint=FIRST)
    compare = functools.partial(diagnostics.agreement_by_step, numbers=(3,), depth=1)
    found, layers = compare(first, exact, {"part": PARAMS}, TASK, state=jnp.array(2.0))
    expected, _ = diagnostics.agreement_by_step(
        functools.partial(curved, adjoint=FIRST), curved, PARAMS, TASK, (3,)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert layers.keys() == {"part"}
    np.testing.assert_array_equal(layers["part"], found)


def test_agreement_by_step_needs_a_number_of_steps():
    with pytest.raises(ValueError, match="at least one number"):
        diagnostics.agreement_by_step(curved, curved, PARAMS, TASK, ())
