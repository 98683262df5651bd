"""Statistics per inner step."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree
from learner_cases import one_task
from problems import smooth

import jaxmaml
from jaxmaml import nn
from jaxmaml.learners.inner_loop import reset_steps


def _per_step_model():
    module = nn.MLP(4, 3, hidden=(5,), norm="per_step", num_steps=2, rngs=nnx.Rngs(0))
    return nn.from_nnx_with_state(module)


def test_maml_plus_plus_uses_each_steps_own_statistics_at_test_time():
    train_fn, apply_fn, params, state = _per_step_model()
    loss_fn, test_loss_fn = (nn.cross_entropy(fn) for fn in (train_fn, apply_fn))
    learner = jaxmaml.maml_plus_plus(loss_fn, 2, test_loss_fn=test_loss_fn)
    meta_params, task = learner.init(params), one_task(smooth())[1]
    _, info = learner.loss(meta_params, task, state=state)
    norm = info.state["norm"][0]
    assert int(norm["inner_step"]) == 3  # two inner steps and the query
    mean = np.asarray(norm["mean"])
    assert len(np.unique(mean.round(6), axis=0)) == 3  # a row for each
    # What the outer step before has counted does not shift the rows.
    again = learner.loss(meta_params, task, state=info.state)[1].state["norm"][0]
    assert int(again["inner_step"]) == 3

    def adapted_with(means):
        used = jax.tree.map(lambda leaf: leaf, info.state)
        used["norm"][0]["mean"] = jnp.asarray(means)
        return ravel_pytree(learner.adapt(meta_params, task.support, state=used)[0])[0]

    usual = adapted_with(mean)
    assert np.abs(adapted_with(mean + np.array([[1.0], [0], [0]])) - usual).max() > 1e-4
    # The last row is the query's, whom adapting does not see.
    np.testing.assert_array_equal(adapted_with(mean + np.array([[0], [0], [1.0]])), usual)
    alone, together = (
        apply_fn(params, {"inputs": task.query["inputs"][:n]}, reset_steps(info.state))[0][:2]
        for n in (2, 6)
    )
    np.testing.assert_allclose(alone, together, rtol=1e-5)  # no statistics of the batch at hand
