"""Small meta-learning problems that the shared table of test_learners.py runs every learner on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmaml import nn
from jaxmaml.types import Task


class Problem(NamedTuple):
    """A loss, parameters and tasks `[num_tasks, ...]`; features where the model has a head."""

    loss_fn: Any
    params: Any
    tasks: Task
    features_fn: Any = None


def quadratic(dtype: Any = jnp.float32) -> Problem:
    """½ mean ||params - batch||²: one inner step of SGD moves by rate * (mean of batch - params)."""
    keys = jax.random.split(jax.random.key(0), 3)
    support, query = (jax.random.normal(key, (4, 4, 3), dtype) for key in keys[:2])
    return Problem(_squared_distance, jax.random.normal(keys[2], (3,), dtype), Task(support, query))


def _squared_distance(params, batch):
    return jnp.mean(jnp.sum((params - batch) ** 2, axis=-1)) / 2


def smooth(dtype: Any = jnp.float32) -> Problem:
    """A tanh network with cross-entropy, 3-way, whose loss closes over an array; no kinks."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    head = {"kernel": draw(8, 3) / 3, "bias": jnp.zeros(3, dtype)}
    params = {"a": {"kernel": draw(4, 8), "bias": draw(8)}, "head": head}
    smoothing = draw(8) / 10

    def features_fn(params, batch):
        return jnp.tanh(batch["inputs"] @ params["a"]["kernel"] + params["a"]["bias"]) + smoothing

    def loss_fn(params, batch):
        logits = features_fn(params, batch) @ params["head"]["kernel"] + params["head"]["bias"]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return losses.mean()

    targets = jnp.asarray(np.tile(np.arange(3), 2), jnp.int32)
    batch = lambda: {"inputs": draw(4, 6, 4), "targets": jnp.tile(targets, (4, 1))}
    return Problem(loss_fn, params, Task(batch(), batch()), features_fn)


def conv4(dtype: Any = jnp.float32) -> Problem:
    """The package's own network, with its ReLUs and batch statistics, 3-way 2-shot on 8x8 images."""
    from flax import nnx

    model = nn.Conv4(
        3, image_shape=(8, 8, 1), num_filters=4, head_init=nnx.initializers.normal(1.0),
        param_dtype=dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip
    apply_fn, params = nn.from_nnx(model)
    rng = np.random.default_rng(0)
    targets = jnp.tile(jnp.asarray(np.repeat(np.arange(3), 2), jnp.int32), (4, 1))
    draw = lambda: {
        "inputs": jnp.asarray(rng.normal(size=(4, 6, 8, 8, 1)), dtype),
        "targets": targets,
    }
    return Problem(nn.cross_entropy(apply_fn), params, Task(draw(), draw()))
