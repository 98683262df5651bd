"""Gradient-based meta-learning in JAX: exact second-order MAML in little memory.

>>> import jax, jax.numpy as jnp, optax, jaxmaml
>>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
>>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), num_inner_steps=5)
>>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
>>> grad, info = jax.grad(learner.loss, has_aux=True)(jnp.array(0.0), task)

`nn`, `rl`, `data`, `checkpoint` and `load` load flax, tensorflow-datasets and orbax when they are
first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxmaml import averaging as averaging
from jaxmaml import diagnostics as diagnostics
from jaxmaml import metrics as metrics
from jaxmaml import mixed_mode as mixed_mode
from jaxmaml import parallel as parallel
from jaxmaml import processes as processes
from jaxmaml import stages as stages
from jaxmaml.adjoints import Annealed as Annealed
from jaxmaml.adjoints import Exact as Exact
from jaxmaml.adjoints import FirstOrder as FirstOrder
from jaxmaml.adjoints import Implicit as Implicit
from jaxmaml.fitting import NonFiniteError as NonFiniteError
from jaxmaml.fitting import fit as fit
from jaxmaml.inner import adapt as adapt
from jaxmaml.inner import fold_keys as fold_keys
from jaxmaml.inner import trace as trace
from jaxmaml.learners.anil import anil as anil
from jaxmaml.learners.boil import boil as boil
from jaxmaml.learners.cavia import cavia as cavia
from jaxmaml.learners.fine_tuning import TrainingClasses as TrainingClasses
from jaxmaml.learners.fine_tuning import fine_tuning as fine_tuning
from jaxmaml.learners.hyperparams import LearnedOptimizer as LearnedOptimizer
from jaxmaml.learners.hyperparams import learned_optimizer as learned_optimizer
from jaxmaml.learners.hyperparams import learned_rates as learned_rates
from jaxmaml.learners.hyperparams import learned_sgd as learned_sgd
from jaxmaml.learners.imaml import imaml as imaml
from jaxmaml.learners.maml import fomaml as fomaml
from jaxmaml.learners.maml import maml as maml
from jaxmaml.learners.maml_plus_plus import maml_plus_plus as maml_plus_plus
from jaxmaml.learners.meta_curvature import meta_curvature as meta_curvature
from jaxmaml.learners.meta_sgd import meta_sgd as meta_sgd
from jaxmaml.learners.proto_maml import proto_maml as proto_maml
from jaxmaml.learners.protonet import protonet as protonet
from jaxmaml.learners.r2d2 import r2d2 as r2d2
from jaxmaml.learners.reptile import reptile as reptile
from jaxmaml.learners.unicorn import unicorn as unicorn
from jaxmaml.metrics import accuracy as accuracy
from jaxmaml.metrics import mean_and_ci95 as mean_and_ci95
from jaxmaml.outer import evaluate as evaluate
from jaxmaml.outer import init_state as init_state
from jaxmaml.outer import meta_grad as meta_grad
from jaxmaml.outer import meta_step as meta_step
from jaxmaml.schedules import multi_step_weights as multi_step_weights
from jaxmaml.types import Extended as Extended
from jaxmaml.types import Info as Info
from jaxmaml.types import MetaLearner as MetaLearner
from jaxmaml.types import MetaState as MetaState
from jaxmaml.types import Task as Task
from jaxmaml.types import with_state as with_state

if TYPE_CHECKING:
    from jaxmaml import checkpoint as checkpoint
    from jaxmaml import data as data
    from jaxmaml import nn as nn
    from jaxmaml import rl as rl
    from jaxmaml.experiments.trained import load as load

__version__ = "0.2.0.dev0"

_LAZY = ("checkpoint", "data", "load", "nn", "rl")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxmaml' has no attribute {name!r}")
    if name == "load":  # the only name of the library that is the application's
        return importlib.import_module("jaxmaml.experiments.trained").load
    return importlib.import_module(f"jaxmaml.{name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
