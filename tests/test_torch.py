"""The meta-gradient against PyTorch: golden arrays everywhere, torch.func itself where installed."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch_reference as reference

import jaxmaml

OPTIMIZERS = {
    "sgd": optax.sgd(reference.RATE),
    "momentum": optax.sgd(reference.RATE, momentum=reference.MOMENTUM),
    "adam": optax.adam(reference.RATE, eps=reference.EPS, eps_root=reference.EPS_ROOT),
}


def _loss_fn(params, batch):
    hidden = jnp.tanh(batch["inputs"] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


@pytest.mark.parametrize("case", reference.CASES, ids=lambda case: reference.name_of(*case))
@pytest.mark.usefixtures("x64")
def test_meta_gradient_is_that_of_torch(case):
    optimizer, num_inner_steps, order = case
    params, arrays = reference.problem()
    support, query = (
        {name: jnp.asarray(arrays[f"{part}_{name}"]) for name in ("inputs", "targets")}
        for part in ("support", "query")
    )
    learner = jaxmaml.maml(_loss_fn, OPTIMIZERS[optimizer], num_inner_steps, order=order)
    gradient = jax.grad(learner.loss, has_aux=True)
    found, _ = gradient(jax.tree.map(jnp.asarray, params), jaxmaml.Task(support, query))
    golden = np.load(reference.GOLDEN)
    for name, grad in found.items():
        expected = golden[f"{reference.name_of(*case)}/{name}"]
        np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("case", reference.CASES, ids=lambda case: reference.name_of(*case))
def test_golden_arrays_are_what_torch_gives(case):
    golden = np.load(reference.GOLDEN)
    for name, grad in reference.meta_grad(*reference.problem(), *case).items():
        expected = golden[f"{reference.name_of(*case)}/{name}"]
        np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-13)
