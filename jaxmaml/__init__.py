"""Gradient-based meta-learning in JAX: exact second-order MAML in first-order memory.

>>> import jax, jax.numpy as jnp, optax, jaxmaml
>>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
>>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), num_inner_steps=5)
>>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
>>> grad, info = jax.grad(learner.loss, has_aux=True)(jnp.array(0.0), task)

`nn`, `data` and `fit` load flax, tensorflow-datasets and the like when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxmaml import diagnostics as diagnostics
from jaxmaml import metrics as metrics
from jaxmaml import mixed_mode as mixed_mode
from jaxmaml import parallel as parallel
from jaxmaml.inner import adapt as adapt
from jaxmaml.inner import fold_keys as fold_keys
from jaxmaml.inner import trace as trace
from jaxmaml.learners.maml import maml as maml
from jaxmaml.metrics import accuracy as accuracy
from jaxmaml.metrics import mean_and_ci95 as mean_and_ci95
from jaxmaml.outer import evaluate as evaluate
from jaxmaml.outer import init_state as init_state
from jaxmaml.outer import meta_grad as meta_grad
from jaxmaml.outer import meta_step as meta_step
from jaxmaml.types import Info as Info
from jaxmaml.types import MetaLearner as MetaLearner
from jaxmaml.types import MetaState as MetaState
from jaxmaml.types import Task as Task

if TYPE_CHECKING:
    from jaxmaml import data as data
    from jaxmaml import nn as nn
    from jaxmaml.train.loop import fit as fit

__version__ = "0.1.0"

_LAZY = {"data": "jaxmaml.data", "nn": "jaxmaml.nn", "fit": "jaxmaml.train.loop"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxmaml' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module.fit if name == "fit" else module


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
