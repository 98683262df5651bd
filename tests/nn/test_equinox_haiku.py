import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    assert_adjoints_agree,
    assert_trees_close,
    classified,
    draw,
    is_finite,
    meta_gradient,
    paths,
)
from flax import nnx

import jaxmaml
from jaxmaml import nn


def equinox_mlp():
    """(apply_fn, params, state, the same in plain JAX)."""
    module = eqx.nn.MLP(4, 3, 8, 1, activation=jnp.tanh, key=jax.random.key(0), dtype=jnp.float64)

    def plain(params, inputs):
        first, last = params.layers
        hidden = jnp.tanh(inputs @ first.weight.T + first.bias)
        return hidden @ last.weight.T + last.bias

    return *nn.from_equinox(module), plain


def haiku_mlp():
    """The same from Haiku."""
    transformed = hk.transform(lambda x: hk.nets.MLP([8, 3], activation=jnp.tanh)(x))
    params = transformed.init(jax.random.key(0), jnp.ones((1, 4)))

    def plain(params, inputs):
        first, last = (params[f"mlp/~/linear_{i}"] for i in range(2))
        return jnp.tanh(inputs @ first["w"] + first["b"]) @ last["w"] + last["b"]

    return *nn.from_haiku(transformed, params), plain


LIBRARIES = {
    "equinox": (equinox_mlp, "layers/1/weight"),
    "haiku": (haiku_mlp, "mlp/~/linear_1/w"),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_outputs_and_meta_gradient_are_those_of_the_plain_function(x64, library):
    apply_fn, params, state, plain = LIBRARIES[library][0]()
    task = classified(4)
    assert state == ()
    expected = plain(params, task.query["inputs"])
    assert_trees_close(apply_fn(params, task.query), expected, rtol=1e-12)
    ours, _ = assert_adjoints_agree(nn.cross_entropy(apply_fn), params, task)
    theirs, _ = meta_gradient(nn.cross_entropy(nn.from_function(plain)), params, task)
    assert_trees_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_paths_masks_and_outer_optimisers_work(x64, library):
    build, name = LIBRARIES[library]
    apply_fn, params, _, _ = build()
    assert name in paths(params)
    is_head = lambda path: path.startswith(name.rsplit("/", 1)[0])
    learner = jaxmaml.maml(
        nn.cross_entropy(apply_fn), optax.adam(0.1, eps_root=1e-8), 2, mask=is_head
    )
    task = classified(4)
    adapted, _ = learner.adapt(params, task.support)
    pairs = zip(jax.tree.leaves_with_path(adapted), jax.tree.leaves(params), strict=True)
    for (path, after), before in pairs:
        named = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (after == before).all() != is_head(named)
    optimizer = optax.adam(1e-2)
    meta_state = jaxmaml.init_state(learner, optimizer, params)
    tasks = jax.tree.map(lambda *leaves: jnp.stack(leaves), task, classified(4, seed=3))
    meta_state, metrics = jaxmaml.meta_step(learner, optimizer, meta_state, tasks)
    assert is_finite((meta_state.params, metrics))
    assert jax.tree.structure(meta_state.params) == jax.tree.structure(params)


def test_equinox_adapted_parameters_make_a_module_again():
    module = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    apply_fn, params, _ = nn.from_equinox(module)
    moved = jax.tree.map(lambda leaf: leaf + 1, params)
    batch = {"inputs": draw(0, 5, 4).astype(jnp.float32)}
    combined = jax.vmap(eqx.combine(moved, module))(batch["inputs"])
    assert_trees_close(apply_fn(moved, batch), combined)


def test_equinox_state_is_carried_from_support_to_query():
    class Net(eqx.Module):
        norm: eqx.nn.BatchNorm
        linear: eqx.nn.Linear

        def __init__(self):
            self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
            self.linear = eqx.nn.Linear(4, 3, key=jax.random.key(0))

        def __call__(self, inputs, state):
            outputs, state = self.norm(inputs, state)
            return self.linear(outputs), state

    module, initial = eqx.nn.make_with_state(Net)()
    apply_fn, params, state = nn.from_equinox(module, state=initial)
    evaluating, _, _ = nn.from_equinox(eqx.nn.inference_mode(module), state=initial)
    batch = {"inputs": draw(0, 50, 4).astype(jnp.float32)}
    outputs, new_state = apply_fn(params, batch, state)
    again, _ = apply_fn(params, batch, state)  # what was read once can be read again
    np.testing.assert_array_equal(outputs, again)
    normed = (batch["inputs"] - batch["inputs"].mean(0)) / batch["inputs"].std(0)
    assert_trees_close(outputs, jax.vmap(module.linear)(normed), rtol=1e-3, atol=1e-3)
    assert not np.allclose(evaluating(params, batch, new_state)[0], outputs, atol=1e-3)
    learner = jaxmaml.maml(
        nn.cross_entropy(apply_fn, has_state=True), optax.sgd(0.1), 2,
        outer_loss_fn=nn.cross_entropy(evaluating, has_state=True), has_state=True,
    )  # fmt: skip
    optimizer = optax.adam(1e-2)
    meta_state = jaxmaml.init_state(learner, optimizer, params, state)
    task = jax.tree.map(lambda leaf: leaf[None], classified(4))
    step = jax.jit(lambda meta_state: jaxmaml.meta_step(learner, optimizer, meta_state, task))
    meta_state, metrics = step(meta_state)
    assert is_finite((meta_state.params, metrics))
    moved = jax.tree.map(lambda a, b: abs(a - b).max(), meta_state.state, initial)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_equinox_dropout_key_from_the_batch():
    module = eqx.nn.Sequential([eqx.nn.Linear(4, 50, key=jax.random.key(0)), eqx.nn.Dropout(0.5)])
    apply_fn, params, _ = nn.from_equinox(module)
    inputs = jnp.ones((8, 4))
    masks = [apply_fn(params, {"inputs": inputs, "key": jax.random.key(i)}) == 0 for i in (1, 1, 2)]
    assert 0.4 < masks[0].mean() < 0.6
    assert (masks[0][0] != masks[0][1]).any()
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()


def test_equinox_call_and_compute_dtype():
    module = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    call = lambda module, batch: 2 * jax.vmap(module)(batch["images"])
    apply_fn, params, _ = nn.from_equinox(module, call, compute_dtype=jnp.bfloat16)
    images = draw(0, 5, 4).astype(jnp.float32)
    outputs = apply_fn(params, {"images": images})
    assert outputs.dtype == jnp.float32
    np.testing.assert_array_equal(outputs, outputs.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(outputs, 2 * jax.vmap(module)(images), atol=0.05)


def test_haiku_state_key_and_call():
    def network(inputs, is_training):
        outputs = hk.BatchNorm(True, True, 0.9)(hk.Linear(50)(inputs), is_training)
        return hk.dropout(hk.next_rng_key(), 0.5, outputs) if is_training else outputs

    transformed = hk.transform_with_state(network)
    inputs = draw(0, 8, 4).astype(jnp.float32)
    initial = transformed.init(jax.random.key(0), inputs, True)
    train = lambda apply, batch: apply(batch["inputs"], is_training=True)
    evaluate = lambda apply, batch: apply(batch["inputs"], is_training=False)
    apply_fn, params, state = nn.from_haiku(transformed, *initial, train)
    evaluating, _, _ = nn.from_haiku(transformed, *initial, evaluate)
    batch = {"inputs": inputs, "key": jax.random.key(1)}
    outputs, new_state = jax.jit(apply_fn)(params, batch, state)
    expected, expected_state = transformed.apply(*initial, batch["key"], inputs, True)
    assert_trees_close((outputs, new_state), (expected, expected_state))
    assert 0.4 < (outputs == 0).mean() < 0.6
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    scored, _ = evaluating(params, {"inputs": inputs}, new_state)
    assert_trees_close(
        scored, transformed.apply(initial[0], expected_state, None, inputs, False)[0]
    )
    task = classified(4, key=batch["key"])
    options = {
        "has_state": True,
        "state": state,
        "outer_loss_fn": nn.cross_entropy(evaluating, has_state=True),
    }
    grads, _ = meta_gradient(nn.cross_entropy(apply_fn, has_state=True), params, task, **options)
    assert is_finite(grads)


def test_adapters_name_what_is_wrong():
    with pytest.raises(TypeError, match=r"equinox\.Module, got Linear"):
        nn.from_equinox(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    apply_fn, params, _ = nn.from_equinox(eqx.nn.Linear(4, 3, key=jax.random.key(0)))
    with pytest.raises(ValueError, match="'inputs'"):
        apply_fn(params, {"images": jnp.ones((2, 4))})
    with pytest.raises(TypeError, match=r"hk\.transform .* got function"):
        nn.from_haiku(lambda: 0, {})
    with pytest.raises(ValueError, match="transform_with_state"):
        nn.from_haiku(hk.transform(lambda x: x), {}, {"norm": {"mean": jnp.ones(3)}})
