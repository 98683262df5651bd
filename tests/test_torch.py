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

ADJOINTS = {"exact": jaxmaml.Exact(), "first": jaxmaml.FirstOrder()}


def _loss_fn(params, batch):
    hidden = jnp.tanh(batch["inputs"] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"]
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def _problem():
    params, arrays = reference.problem()
    support, query = (
        {name: jnp.asarray(arrays[f"{name_of_batch}_{name}"]) for name in ("inputs", "targets")}
        for name_of_batch in ("support", "query")
    )
    return jax.tree.map(jnp.asarray, params), jaxmaml.Task(support, query)


FURTHER = {("adam", 10, "exact"), ("sgd", 1, "exact")}
"""The default tests take these beside the cases of three inner steps."""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case[1] == 3 or case in FURTHER else pytest.mark.slow)
        for case in reference.CASES
    ],
    ids=lambda case: reference.name_of(*case),
)
@pytest.mark.usefixtures("x64")
def test_meta_gradient_is_that_of_torch(case):
    optimizer, num_inner_steps, order = case
    params, task = _problem()
    learner = jaxmaml.maml(
        _loss_fn, OPTIMIZERS[optimizer], num_inner_steps, adjoint=ADJOINTS[order]
    )
    found, _ = jax.jit(jax.grad(learner.loss, has_aux=True))(params, task)
    golden = np.load(reference.GOLDEN)
    for name, grad in found.items():
        expected = golden[f"{reference.name_of(*case)}/{name}"]
        np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_anil_and_meta_sgd_are_those_of_torch():
    (params, task), steps = _problem(), reference.NUM_VARIANT_STEPS
    anil = jaxmaml.anil(_loss_fn, optax.sgd(reference.RATE), steps, head="w2")
    meta_sgd = jaxmaml.meta_sgd(_loss_fn, steps, inner_lr=reference.RATE)
    golden = np.load(reference.GOLDEN)
    of_anil = jax.grad(anil.loss, has_aux=True)(params, task)[0]
    of_meta_sgd = jax.grad(meta_sgd.loss, has_aux=True)(meta_sgd.init(params), task)[0]
    found = {
        "anil/params": of_anil,
        "meta_sgd/params": of_meta_sgd.params,
        "meta_sgd/rates": of_meta_sgd.learned["hyperparams"],
    }
    for part, grads in found.items():
        for name, grad in grads.items():
            np.testing.assert_allclose(grad, golden[f"{part}/{name}"], rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("case", reference.CASES, ids=lambda case: reference.name_of(*case))
def test_golden_arrays_are_what_torch_gives(case):
    golden = np.load(reference.GOLDEN)
    for name, grad in reference.meta_grad(*reference.problem(), *case).items():
        expected = golden[f"{reference.name_of(*case)}/{name}"]
        np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_golden_arrays_of_the_variants_are_what_torch_gives(variant):
    golden, found = np.load(reference.GOLDEN), reference.variant_grad(*reference.problem(), variant)
    for part, grads in zip(("params", "rates"), found, strict=True):
        for name, grad in grads.items():
            expected = golden[f"{variant}/{part}/{name}"]
            np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-13)
