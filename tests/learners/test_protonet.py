"""Prototypes against NumPy."""

import numpy as np
from learner_cases import one_task
from problems import smooth

import jaxmaml


def test_protonet_classifies_by_the_nearest_mean():
    problem = smooth()
    params, task = one_task(problem)
    adapted, _ = jaxmaml.protonet(problem.loss_fn, problem.features_fn).adapt(params, task.support)
    logits = problem.features_fn(params, task.query) @ adapted["head"]["kernel"]
    logits += adapted["head"]["bias"][None]
    support, query = (np.asarray(problem.features_fn(params, batch)) for batch in task)
    targets = np.asarray(task.support["targets"])
    means = np.stack([support[targets == label].mean(0) for label in range(3)])
    distances = ((query[:, None] - means) ** 2).sum(-1)
    np.testing.assert_allclose(
        logits - logits[:, :1], distances[:, :1] - distances, rtol=1e-4, atol=1e-5
    )
