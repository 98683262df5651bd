"""Joint training over all classes, then fine-tuning."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learner_cases import SGD, meta_gradient, one_task
from problems import smooth

import jaxmaml


def test_fine_tuning_learns_all_training_classes_and_adapts_the_episodes_head():
    problem = smooth()
    params, task = one_task(problem)
    classes = jaxmaml.TrainingClasses(problem.features_fn, num_classes=7)
    learner = jaxmaml.fine_tuning(problem.loss_fn, SGD, 2, classes=classes)
    meta_params = learner.init(params)
    numbered = jaxmaml.Task(*({**batch, "classes": batch["targets"] + 4} for batch in task))
    loss, _ = learner.loss(meta_params, numbered)
    np.testing.assert_allclose(loss, np.log(7), rtol=1e-6)  # its head starts with zeros
    grads = meta_gradient(learner, meta_params, numbered)
    seen = np.abs(grads.learned["classes"]["kernel"]).sum(0) > 0
    assert seen.all()
    assert not np.any(grads.params["head"]["kernel"])
    with pytest.raises(ValueError, match="classes"):
        learner.loss(meta_params, task)


def test_a_wrong_class_is_refused_and_padding_may_hold_anything():
    params, task = one_task(smooth())
    classes = jaxmaml.TrainingClasses(smooth().features_fn, num_classes=7)
    learner = jaxmaml.fine_tuning(smooth().loss_fn, SGD, 1, classes=classes)

    def loss_of(**extra):
        batch = {**task.query, "classes": task.query["targets"], **extra}
        return learner.loss(learner.init(params), jaxmaml.Task(batch, batch))[0]

    with pytest.raises(ValueError, match=r"classes in 0\.\.6; got 7"):
        loss_of(classes=task.query["targets"].at[0].set(7))
    weights = jnp.ones(6).at[0].set(0)
    inputs = task.query["inputs"].at[0].set(jnp.nan)
    np.testing.assert_allclose(loss_of(weights=weights, inputs=inputs), np.log(7), rtol=1e-6)


def test_every_joint_step_is_at_inner_step_zero():
    """Otherwise the rows of a normalization per step would be trained in one outer step each."""

    def loss_fn(params, batch, state):
        row = params[jnp.minimum(state["inner_step"], 2)]
        return jnp.mean((row - batch) ** 2), {"inner_step": state["inner_step"] + 1}

    learner = jaxmaml.fine_tuning(jaxmaml.with_state(loss_fn), optax.sgd(0.1), 2)
    optimizer, task = optax.sgd(0.1), jaxmaml.Task(jnp.ones((1, 2)), jnp.ones((1, 2)))
    state = {"inner_step": jnp.zeros((), jnp.int32)}
    meta_state = jaxmaml.init_state(learner, optimizer, jnp.zeros(3), state=state)
    for _ in range(3):
        meta_state, _ = jaxmaml.meta_step(learner, optimizer, meta_state, task)
    assert meta_state.params[0] > 0.4
    assert meta_state.params[1:].tolist() == [0.0, 0.0]
