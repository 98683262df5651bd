"""Problems for the tests of diagnostics: one with a closed form, and a network with features."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from problems import smooth

import jaxmaml
from jaxmaml.types import MetaLearner, Task

EXACT, FIRST = jaxmaml.Exact(), jaxmaml.FirstOrder()
RATE = 0.1
CURVATURE = {"body": 1.0, "head": 4.0}
TASK = Task(
    support=jnp.array([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]]),
    query=jnp.array([[0.0, 5.0], [2.0, 1.0]]),
)
PARAMS = {"body": {"w": jnp.array([5.0, 5.0])}, "head": {"w": jnp.array([2.0, -3.0])}}


def curved_loss(params, batch):
    """Each layer in a bowl of its own: inner SGD shrinks its distance to the batch's mean."""
    distance = lambda layer: jnp.mean(jnp.sum((params[layer]["w"] - batch) ** 2, axis=-1))
    return sum(CURVATURE[layer] / 2 * distance(layer) for layer in CURVATURE)


@jaxmaml.with_state
def counted_loss(params, batch, state):
    """The same plus a state that counts the inner steps."""
    return curved_loss(params, batch) + state, state + 1


def curved_after(layer, num_inner_steps):
    """A layer's parameters after `num_inner_steps` steps on TASK, in closed form."""
    shrink = (1 - RATE * CURVATURE[layer]) ** num_inner_steps
    return np.array([2.0, 1.0]) + shrink * (np.asarray(PARAMS[layer]["w"]) - np.array([2.0, 1.0]))


def curved(num_inner_steps, rate=RATE, loss_fn=curved_loss, **options) -> MetaLearner:
    return jaxmaml.maml(loss_fn, optax.sgd(rate), num_inner_steps, **options)


def task_at(tasks, index) -> Task:
    return jax.tree.map(lambda leaf: leaf[index], tasks)


def smooth_features(params, batch):
    hidden = jnp.tanh(batch["inputs"] @ params["a"]["kernel"])
    return {"a": hidden, "head": [hidden @ params["head"]["kernel"]]}


def unbiased():
    """`smooth` without the addition of a bias, which promotes its rank."""

    def loss_fn(params, batch):
        logits = smooth_features(params, batch)["head"][0]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return losses.mean()

    return smooth()._replace(loss_fn=loss_fn)
