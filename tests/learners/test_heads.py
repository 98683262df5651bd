"""The head of a model in its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_close
from learner_cases import learner_of, one_task
from problems import smooth

import jaxmaml
from jaxmaml import nn
from jaxmaml.learners import heads
from jaxmaml.padding import blank_padding


def _means(batch):
    """The means of two classes, whose features are ones."""
    return heads.prototypes(jnp.ones((3, 4)), heads.one_hot(batch, 2, jnp.float32))


def test_a_head_without_a_bias_cannot_hold_distances():
    problem = smooth()
    params, task = one_task(problem)
    params = {**params, "head": {"kernel": params["head"]["kernel"]}}
    with pytest.raises(ValueError, match="has no bias"):
        heads.fill(params, "head", jnp.zeros((8, 3)), jnp.zeros(3))
    with pytest.raises(ValueError, match="has no bias"):
        learner_of("protonet").adapt(params, task.support)


@pytest.mark.parametrize(
    "wrong", [{"targets": [0, -1, 1]}, {"targets": [0, 2, 1]}, {"weights": [1, -1, 1]}]
)
def test_a_wrong_target_or_weight_fills_no_head(wrong):
    batch = {"targets": jnp.array([0, 1, 1])} | {name: jnp.array(x) for name, x in wrong.items()}
    with pytest.raises(ValueError, match=r"classes in 0\.\.1; got|weights must be 0 or more"):
        _means(batch)
    means = jax.jit(_means)(batch)
    assert jnp.isnan(means).any()


def test_padding_may_have_any_target():
    batch = {"targets": jnp.array([0, -1, 1]), "weights": jnp.array([1, 0, 1])}
    assert _means(batch).tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("name", ["protonet", "proto_maml", "r2d2"])
def test_padding_may_hold_anything_in_the_derivative_too(name):
    """A product in the features keeps a NaN of a padded input, which a mask after it does not remove."""
    features_fn = lambda params, batch: batch["inputs"] @ params["body"]

    def loss_fn(params, batch):
        batch = {**batch, "inputs": blank_padding(batch["inputs"], batch["weights"])}
        head = params["head"]
        logits = features_fn(params, batch) @ head["kernel"] + head["bias"]
        return jnp.mean(batch["weights"] * (logits[:, 0] - batch["targets"]) ** 2)

    params = {"body": jnp.eye(2), "head": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}}
    options = {"proto_maml": (optax.sgd(0.1), 1)}.get(name, ())
    learner = getattr(jaxmaml, name)(loss_fn, *options, features_fn)
    batch = {
        "inputs": jnp.array([[1.0, 2.0], [3.0, 4.0], [jnp.nan, 1.0]]),
        "targets": jnp.array([0, 1, 1]), "weights": jnp.array([1.0, 1.0, 0.0]),
    }  # fmt: skip
    task = jaxmaml.Task(batch, batch)
    grads, _ = jax.grad(learner.loss, has_aux=True)(learner.init(params), task)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_head_may_lie_in_a_list_of_layers():
    layers = {"layers": {0: {"kernel": jnp.ones((2, 2))}, 1: {"kernel": jnp.zeros((2, 3))}}}
    assert heads.get(layers, "layers/1")["kernel"].shape == (2, 3)
    filled = heads.fill(layers, "layers/1", jnp.ones((2, 3)), None)
    assert list(filled["layers"]) == [0, 1]
    assert filled["layers"][1]["kernel"].tolist() == [[1.0] * 3] * 2
    with pytest.raises(ValueError, match="in place of '2' there is 0, 1"):
        heads.get(layers, "layers/2")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["protonet", "proto_maml", "r2d2"])
def test_a_class_that_the_task_lacks_changes_nothing(name):
    """A head of five classes on a task of two is a head of two: loss, accuracy, gradient."""
    keys = iter(jax.random.split(jax.random.key(0), 3))
    body = jax.random.normal(next(keys), (3, 4))
    features_fn = lambda params, batch: batch["inputs"] @ params["body"]

    def apply_fn(params, batch):
        return features_fn(params, batch) @ params["head"]["kernel"] + params["head"]["bias"]

    options = {"proto_maml": (optax.sgd(0.1), 2)}.get(name, ())
    learner = getattr(jaxmaml, name)(nn.cross_entropy(apply_fn), *options, features_fn)
    batch = lambda key: {
        "inputs": jax.random.normal(key, (4, 3)), "targets": jnp.array([0, 1, 0, 1], jnp.uint8)
    }  # fmt: skip
    task = jaxmaml.Task(batch(next(keys)), batch(next(keys)))

    def scored(way):
        head = {"kernel": jnp.zeros((4, way)), "bias": jnp.zeros(way)}
        meta_params = learner.init({"body": body, "head": head})
        loss = lambda meta_params: learner.loss(meta_params, task)[0]
        value, grads = jax.jit(jax.value_and_grad(loss))(meta_params)
        adapted = learner.adapt(meta_params, task.support)[0]
        grads = grads.params if name == "r2d2" else grads
        return value, grads["body"], nn.accuracy(apply_fn)(adapted, task.query)

    assert_close(scored(5), scored(2), 1e-13)


def test_narrow_integers_name_one_class_each():
    batch = {"targets": jnp.array([0, 1], jnp.uint8)}
    rows = heads.one_hot(batch, 300, jnp.float32)
    assert jnp.argwhere(rows).tolist() == [[0, 0], [1, 1]]
