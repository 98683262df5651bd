"""A decoder-only language model, written so that its exact meta-gradient needs little memory.

README.md, "Large models", says why it is written like this.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmaml.types import Array, Params

HEAD_WIDTH = 64
CHUNK = 256
"""Queries of attention, and tokens of the loss, that are computed at once."""


class Model(NamedTuple):
    """The size of a language model.

    Attributes:
        layers: blocks.
        width: width of the residual stream, a multiple of 64.
        vocabulary: different tokens.
        sequence: tokens per sequence.
        rank: rank of the low-rank matrices that may be added to the blocks.
    """

    layers: int
    width: int
    vocabulary: int = 50304
    sequence: int = 2048
    rank: int = 16


MODELS = {"125M": Model(12, 768), "350M": Model(24, 1024), "1.3B": Model(24, 2048)}
QUICK = Model(2, 64, vocabulary=64, sequence=32, rank=2)


def base_shapes(model: Model) -> Params:
    """Returns the shapes of the parameters; those of the blocks are stacked, `[layers, ...]`."""
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    blocks = {name: shape(model.layers, *dims) for name, dims in _matrices(model).items()}
    norms = {name: shape(model.layers, model.width) for name in ("norm_in", "norm_mlp")}
    return {
        "tokens": shape(model.vocabulary, model.width),
        "positions": shape(model.sequence, model.width),
        "norm": shape(model.width),
        "blocks": blocks | norms,
    }


def lora_shapes(model: Model) -> Params:
    """Returns the shapes of two low-rank factors for every matrix of every block."""
    shape = lambda *dims: jax.ShapeDtypeStruct((model.layers, *dims), jnp.float32)
    return {
        name: {"a": shape(rows, model.rank), "b": shape(model.rank, columns)}
        for name, (rows, columns) in _matrices(model).items()
    }


def _matrices(model: Model) -> dict[str, tuple[int, int]]:
    d = model.width
    return {"qkv": (d, 3 * d), "out": (d, d), "up": (d, 4 * d), "down": (4 * d, d)}


def loss_fn(base: Params, lora: Params, tokens: Array, dtype: Any = jnp.float32) -> Array:
    """Returns the mean cross-entropy of the next token.

    Args:
        base: like `base_shapes`.
        lora: like `lora_shapes`, or `{}` for none.
        tokens: `[num_sequences, sequence + 1]`.
        dtype: in which the blocks and the logits are computed.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = (base["tokens"][inputs] + base["positions"]).astype(dtype)
    # A scan: neither the time to compile nor what one block needs grows with the number of blocks.
    block = jax.checkpoint(_block, prevent_cse=False)
    x, _ = jax.lax.scan(block, x, (base["blocks"], lora))
    x = _norm(x, base["norm"].astype(dtype)).reshape(-1, x.shape[-1])
    cross_entropy = lambda x, target: _cross_entropy(base["tokens"], x, target)
    return _in_chunks(cross_entropy, x, targets.reshape(-1)).mean()


def _block(x: Array, params: tuple[Params, Params]) -> tuple[Array, None]:
    # Only the parameters of this block are cast.
    base, lora = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)

    def product(name: str, x: Array) -> Array:
        y = x @ base[name]
        return y + (x @ lora[name]["a"]) @ lora[name]["b"] if lora else y

    def sequence(x: Array) -> Array:
        heads = product("qkv", _norm(x, base["norm_in"])).reshape(len(x), -1, HEAD_WIDTH)
        attended = _attention(*jnp.split(heads, 3, axis=1))
        x = x + product("out", attended.reshape(x.shape))
        hidden = jax.nn.gelu(product("up", _norm(x, base["norm_mlp"])))
        return x + product("down", hidden)

    return jax.vmap(sequence)(x), None


def _attention(query: Array, key: Array, value: Array) -> Array:
    """Causal attention of one sequence, `[sequence, heads, HEAD_WIDTH]`; no `[sequence, sequence]`."""
    positions = jnp.arange(len(query))

    def attend(query: Array, at: Array) -> Array:
        scores = jnp.einsum("qhd,khd->hqk", query, key).astype(jnp.float32) * HEAD_WIDTH**-0.5
        scores = jnp.where(positions <= at[:, None], scores, -1e30)
        return jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores).astype(value.dtype), value)

    return _in_chunks(attend, query, positions)


def _cross_entropy(embeddings: Array, x: Array, target: Array) -> Array:
    """Cross-entropies `[tokens]` of outputs `[tokens, width]`.

    The logit of the target is a product with its embedding: picked out of the logits, its derivative
    would be an array of their shape, which XLA keeps for all chunks.
    """
    embeddings = embeddings.astype(x.dtype)
    logits = (x @ embeddings.T).astype(jnp.float32)
    at_target = jnp.sum(x * embeddings[target], axis=-1, dtype=jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - at_target


def _in_chunks(function: Callable[..., Array], *arrays: Array) -> Array:
    """Applies a function to chunks of rows; the backward pass recomputes one chunk at a time."""
    size = min(CHUNK, len(arrays[0]))
    chunks = tuple(array.reshape(-1, size, *array.shape[1:]) for array in arrays)
    out = jax.lax.map(jax.checkpoint(lambda chunk: function(*chunk)), chunks)
    return out.reshape(-1, *out.shape[2:])


def _norm(x: Array, scale: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
