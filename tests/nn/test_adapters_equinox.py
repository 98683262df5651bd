import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    NormedEquinox,
    assert_adjoints_agree,
    classified,
    draw,
    is_finite,
    meta_gradient,
    stacked,
)
from comparing import assert_leaves_close
from flax import nnx

import jaxmaml
from jaxmaml import nn, trees


def mlp():
    """Returns (apply_fn, params, the same network in plain JAX)."""
    module = eqx.nn.MLP(4, 3, 8, 1, activation=jnp.tanh, key=jax.random.key(0), dtype=jnp.float64)

    def plain(params, inputs):
        first, last = params.layers
        hidden = jnp.tanh(inputs @ first.weight.T + first.bias)
        return hidden @ last.weight.T + last.bias

    return *nn.from_equinox(module), plain


def test_outputs_and_meta_gradient_are_those_of_the_plain_function(x64):
    apply_fn, params, plain = mlp()
    task = classified(4)
    expected = plain(params, task.query["inputs"])
    assert_leaves_close(apply_fn(params, task.query), expected, rtol=1e-12)
    ours, _ = assert_adjoints_agree(nn.cross_entropy(apply_fn), params, task)
    theirs, _ = meta_gradient(nn.cross_entropy(nn.from_function(plain)), params, task)
    assert_leaves_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_paths_masks_and_outer_optimizers_work(x64):
    apply_fn, params, _ = mlp()
    assert "layers/1/weight" in trees.leaf_paths(params)
    is_head = lambda path: path.startswith("layers/1")
    learner = jaxmaml.maml(
        nn.cross_entropy(apply_fn), optax.adam(0.1, eps_root=1e-8), 2, mask=is_head
    )
    task = classified(4)
    adapted, _ = learner.adapt(params, task.support)
    leaves = zip(jax.tree.leaves(adapted), jax.tree.leaves(params), strict=True)
    for path, (after, before) in zip(trees.leaf_paths(params), leaves, strict=True):
        assert (after == before).all() != is_head(path)
    optimizer = optax.adam(1e-2)
    meta_state = jaxmaml.init_state(learner, optimizer, params)
    tasks = stacked(task, classified(4, seed=3))
    meta_state, metrics = jaxmaml.meta_step(learner, optimizer, meta_state, tasks)
    assert is_finite((meta_state.params, metrics))
    assert jax.tree.structure(meta_state.params) == jax.tree.structure(params)


def test_adapted_parameters_make_a_module_again():
    module = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    apply_fn, params = nn.from_equinox(module)
    moved = jax.tree.map(lambda leaf: leaf + 1, params)
    batch = {"inputs": draw(0, 5, 4).astype(jnp.float32)}
    combined = jax.vmap(eqx.combine(moved, module))(batch["inputs"])
    assert_leaves_close(apply_fn(moved, batch), combined)


def test_a_frozen_part_of_a_module_stays_frozen_in_training():
    module, initial = eqx.nn.make_with_state(NormedEquinox)()
    module = eqx.tree_at(lambda m: m.norm, module, eqx.nn.inference_mode(module.norm))
    model = nn.from_equinox_with_state(module, initial)
    batch = {"inputs": draw(0, 50, 4).astype(jnp.float32)}
    _, state = model.train_fn(model.params, batch, model.state)
    assert_leaves_close(state, initial)


def test_a_module_has_two_modes():
    module, initial = eqx.nn.make_with_state(NormedEquinox)()
    model = nn.from_equinox_with_state(module, initial)
    batch = {"inputs": draw(0, 50, 4).astype(jnp.float32)}
    outputs, new_state = model.train_fn(model.params, batch, model.state)
    again, _ = model.train_fn(model.params, batch, model.state)
    np.testing.assert_array_equal(outputs, again)
    normed = (batch["inputs"] - batch["inputs"].mean(0)) / batch["inputs"].std(0)
    assert_leaves_close(outputs, jax.vmap(module.linear)(normed), rtol=1e-3, atol=1e-3)
    scored, _ = model.test_fn(model.params, {"inputs": batch["inputs"] + 1}, new_state)
    assert not np.allclose(scored, outputs, atol=1e-3)
    moved = jax.tree.map(lambda a, b: abs(a - b).max(), new_state, initial)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_a_stateful_module_may_have_one_mode_and_a_call_of_its_own():
    class Counter(eqx.Module):
        index: eqx.nn.StateIndex
        linear: eqx.nn.Linear

        def __init__(self):
            self.index = eqx.nn.StateIndex(jnp.array(0))
            self.linear = eqx.nn.Linear(4, 3, key=jax.random.key(0))

        def __call__(self, inputs, state):
            return jax.vmap(self.linear)(inputs), state.set(self.index, state.get(self.index) + 1)

    module, initial = eqx.nn.make_with_state(Counter)()
    call = lambda module, batch, state: module(batch["images"], state)
    model = nn.from_equinox_with_state(module, initial, call)
    batch = {"images": draw(0, 5, 4).astype(jnp.float32)}
    for fn in (model.train_fn, model.test_fn):
        outputs, state = fn(model.params, batch, model.state)
        assert_leaves_close(outputs, jax.vmap(module.linear)(batch["images"]))
        assert state.get(module.index) == 1
    assert initial.get(module.index) == 0


def test_dropout_key_from_the_batch():
    module = eqx.nn.Sequential([eqx.nn.Linear(4, 50, key=jax.random.key(0)), eqx.nn.Dropout(0.5)])
    apply_fn, params = nn.from_equinox(module)
    inputs = jnp.ones((8, 4))
    masks = [apply_fn(params, {"inputs": inputs, "key": jax.random.key(i)}) == 0 for i in (1, 1, 2)]
    assert 0.4 < masks[0].mean() < 0.6
    assert (masks[0][0] != masks[0][1]).any()
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()


def test_call_and_compute_dtype():
    module = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    call = lambda module, batch: 2 * jax.vmap(module)(batch["images"])
    apply_fn, params = nn.from_equinox(module, call, compute_dtype=jnp.bfloat16)
    images = draw(0, 5, 4).astype(jnp.float32)
    outputs = apply_fn(params, {"images": images})
    assert outputs.dtype == jnp.float32
    np.testing.assert_array_equal(outputs, outputs.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(outputs, 2 * jax.vmap(module)(images), atol=0.05)


def test_adapters_name_what_is_wrong():
    for build in (nn.from_equinox, lambda module: nn.from_equinox_with_state(module, ())):
        with pytest.raises(TypeError, match=r"equinox\.Module, got Linear"):
            build(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    apply_fn, params = nn.from_equinox(eqx.nn.Linear(4, 3, key=jax.random.key(0)))
    with pytest.raises(ValueError, match="'inputs'"):
        apply_fn(params, {"images": jnp.ones((2, 4))})
    with pytest.raises(TypeError, match=r"state must be an equinox\.nn\.State, got dict"):
        nn.from_equinox_with_state(eqx.nn.make_with_state(NormedEquinox)()[0], {})


def test_an_equinox_module_that_still_holds_its_initial_state_is_refused():
    """Its arrays would count as parameters."""
    _, state = eqx.nn.make_with_state(NormedEquinox)()
    with pytest.raises(ValueError, match=r"initial value of its state at norm/.*make_with_state"):
        nn.from_equinox_with_state(NormedEquinox(), state)
