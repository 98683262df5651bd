"""UNICORN does not depend on the numbering of the classes."""

import jax
import jax.numpy as jnp
import numpy as np
from learner_cases import SGD, one_task
from problems import smooth

import jaxmaml


def test_unicorn_does_not_depend_on_how_classes_are_numbered():
    problem = smooth()
    params, task = one_task(problem)
    learner = jaxmaml.unicorn(problem.loss_fn, SGD, 3)
    order = jnp.array([2, 0, 1])
    renumbered = jax.tree.map(lambda x: x, task)
    for batch in renumbered:
        batch["targets"] = order[batch["targets"]]
    losses = [learner.loss(learner.init(params), t)[0] for t in (task, renumbered)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    maml = jaxmaml.maml(problem.loss_fn, SGD, 3)
    assert abs(maml.loss(params, task)[0] - maml.loss(params, renumbered)[0]) > 1e-3
