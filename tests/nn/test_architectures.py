"""The exact meta-gradient through networks that this package does not build itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_adjoints_agree, classified, draw
from flax import nnx

import jaxmaml
from jaxmaml import nn


class Recurrent(nnx.Module):
    """The last output of a recurrent cell, `[num_examples, time, 3]` to `[num_examples, 3]`."""

    def __init__(self, cell):
        rngs = nnx.Rngs(0)
        self.rnn = nnx.RNN(cell(3, 4, param_dtype=jnp.float64, rngs=rngs))
        self.head = nnx.Linear(4, 3, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, inputs):
        return self.head(jnp.asarray(self.rnn(inputs))[:, -1])


def attend(query, key, value, **_):
    """Scaled dot-product attention; Flax's own rounds its softmax to float32."""
    scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), value)


class Transformer(nnx.Module):
    """One block of attention and one of dense layers, with dropout, and a mean over time."""

    def __init__(self):
        options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.attention = nnx.MultiHeadAttention(
            2, 3, 4, attention_fn=attend, decode=False, **options
        )
        self.norm = nnx.List(nnx.LayerNorm(3, **options) for _ in range(2))
        self.up = nnx.Linear(3, 8, **options)
        self.down = nnx.Linear(8, 3, **options)
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, inputs, rngs=None):
        x = inputs + self.attention(self.norm[0](inputs))
        x = x + self.dropout(self.down(jax.nn.gelu(self.up(self.norm[1](x)))), rngs=rngs)
        return x.mean(1)


def with_key(module, batch):
    return module(batch["inputs"], rngs=nnx.Rngs(dropout=batch["key"]))


ARCHITECTURES = {
    "lstm": (lambda: Recurrent(nnx.LSTMCell), None),
    "gru": (lambda: Recurrent(nnx.GRUCell), None),
    "transformer": (Transformer, with_key),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_adjoints_give_one_meta_gradient(x64, name):
    build, call = ARCHITECTURES[name]
    apply_fn, params, state = nn.from_nnx(build(), call)
    assert state == ()
    task = classified(5, 3, key=jax.random.key(0))
    assert_adjoints_agree(nn.cross_entropy(apply_fn), params, task)


def test_dropout_differs_from_key_to_key_and_from_step_to_step(x64):
    apply_fn, params, _ = nn.from_nnx(Transformer(), with_key)
    loss_fn = jax.jit(nn.cross_entropy(apply_fn))
    support = classified(5, 3).support
    task_loss = lambda seed: float(loss_fn(params, {**support, "key": jax.random.key(seed)}))
    assert task_loss(0) == task_loss(0) != task_loss(1)
    still = optax.sgd(0.0)
    losses = jaxmaml.adapt(loss_fn, params, {**support, "key": jax.random.key(0)}, still, 3)
    assert len(set(losses[1].inner_losses.tolist())) == 3


@pytest.mark.parametrize("columns", [(), (1,)])
def test_binary_classification(x64, columns):
    inputs, targets = draw(0, 6, 4), jnp.array([0, 1, 1, 0, 1, 0])
    weights = jnp.array([1.0, 2.0, 0.0, 1.0, 1.0, 0.5])
    loss_fn = nn.binary_cross_entropy(nn.from_function(lambda params, x: x @ params))
    batch = {"inputs": inputs, "targets": targets, "weights": weights}
    params = draw(1, 4, *columns)
    probability = 1 / (1 + np.exp(-inputs @ params.reshape(4)))
    expected = (weights * (probability - targets)) @ inputs / weights.sum()
    grad = jax.grad(loss_fn)(params, batch)
    np.testing.assert_allclose(grad.reshape(4), expected, rtol=1e-10)
    task = classified(4, way=2)
    assert_adjoints_agree(loss_fn, params, task)
