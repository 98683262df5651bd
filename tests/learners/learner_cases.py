"""What the tests of single learners share."""

import functools

import jax
import optax
from problems import smooth

import jaxmaml

SGD = optax.sgd(0.1)


def one_task(problem):
    return problem.params, jax.tree.map(lambda leaf: leaf[0], problem.tasks)


def meta_gradient(learner, meta_params, task, **options):
    loss = functools.partial(learner.loss, **options)
    return jax.jit(jax.grad(loss, has_aux=True))(meta_params, task)[0]


def learner_of(name, **options):
    problem = smooth()
    rest = {"anil": (SGD, 1), "boil": (SGD, 1), "cavia": (SGD, 1), "maml": (SGD, 1), "unicorn": (SGD, 1),
            "reptile": (SGD, 1), "imaml": (SGD, 1), "meta_sgd": (1,), "maml_plus_plus": (1,),
            "protonet": (problem.features_fn,), "r2d2": (problem.features_fn,)}  # fmt: skip
    return getattr(jaxmaml, name)(problem.loss_fn, *rest[name], **options)


def adapted_from_init(learner, params, task):
    return learner.adapt(learner.init(params), task.support)
