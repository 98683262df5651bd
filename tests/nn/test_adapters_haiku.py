import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import (
    assert_adjoints_agree,
    classified,
    draw,
    in_evaluation,
    in_training,
    is_finite,
    is_plain,
    meta_gradient,
    stacked,
)
from comparing import assert_leaves_close

import jaxmaml
from jaxmaml import nn, trees


def mlp():
    """Returns (apply_fn, params, the same network in plain JAX)."""
    transformed = hk.transform(lambda x: hk.nets.MLP([8, 3], activation=jnp.tanh)(x))
    params = transformed.init(jax.random.key(0), jnp.ones((1, 4)))

    def plain(params, inputs):
        first, last = (params[f"mlp/~/linear_{i}"] for i in range(2))
        return jnp.tanh(inputs @ first["w"] + first["b"]) @ last["w"] + last["b"]

    return *nn.from_haiku(transformed, params), plain


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
    assert "mlp/~/linear_1/w" in trees.leaf_paths(params)
    is_head = lambda path: path.startswith("mlp/~/linear_1")
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


def test_state_key_and_calls():
    def network(inputs, is_training):
        outputs = hk.BatchNorm(True, True, 0.9)(hk.Linear(50)(inputs), is_training)
        return hk.dropout(hk.next_rng_key(), 0.5, outputs) if is_training else outputs

    transformed = hk.transform_with_state(network)
    inputs = draw(0, 8, 4).astype(jnp.float32)
    initial = transformed.init(jax.random.key(0), inputs, True)
    model = nn.from_haiku_with_state(transformed, *initial, in_training, in_evaluation)
    assert is_plain(model.params)
    assert is_plain(model.state)
    batch = {"inputs": inputs, "key": jax.random.key(1)}
    outputs, new_state = jax.jit(model.train_fn)(model.params, batch, model.state)
    expected, expected_state = transformed.apply(*initial, batch["key"], inputs, True)
    assert_leaves_close((outputs, new_state), (expected, expected_state))
    assert 0.4 < (outputs == 0).mean() < 0.6
    assert jax.tree.structure(new_state) == jax.tree.structure(model.state)
    scored, _ = model.test_fn(model.params, {"inputs": inputs}, new_state)
    assert_leaves_close(
        scored, transformed.apply(initial[0], expected_state, None, inputs, False)[0]
    )
    loss_fn, query_loss_fn = map(nn.cross_entropy, (model.train_fn, model.test_fn))
    options = {"state": model.state, "query_loss_fn": query_loss_fn}
    task = classified(4, key=batch["key"])
    grads, _ = meta_gradient(loss_fn, model.params, task, **options)
    assert is_finite(grads)


def test_without_state_key_and_call():
    transformed = hk.transform(lambda inputs: hk.dropout(hk.next_rng_key(), 0.5, inputs))
    twice = lambda apply, batch: apply(batch["inputs"]) + apply(batch["inputs"])
    apply_fn, params = nn.from_haiku(transformed, {}, twice)
    batch = {"inputs": jnp.ones((20, 4)), "key": jax.random.key(0)}
    assert_leaves_close(
        apply_fn(params, batch), 2 * transformed.apply({}, batch["key"], batch["inputs"])
    )


def test_adapters_name_what_is_wrong():
    plain = hk.transform(lambda x: x)
    with pytest.raises(TypeError, match=r"hk\.transform, got function"):
        nn.from_haiku(lambda: 0, {})
    with pytest.raises(TypeError, match=r"hk\.transform_with_state, got Transformed"):
        nn.from_haiku_with_state(plain, {}, {}, in_training, in_evaluation)
    with pytest.raises(ValueError, match="'inputs'"):
        nn.from_haiku(plain, {})[0]({}, {"images": jnp.ones((2, 4))})


def test_a_haiku_state_that_grows_is_refused_by_its_name():
    def network(inputs):
        seen = hk.get_state("seen", (0, 4), init=jnp.zeros)
        hk.set_state("seen", jnp.concatenate([seen, inputs]))
        return hk.Linear(3)(inputs)

    transformed, call = (
        hk.transform_with_state(network),
        lambda apply, batch: apply(batch["inputs"]),
    )
    variables = transformed.init(jax.random.key(0), jnp.ones((2, 4)))
    model = nn.from_haiku_with_state(transformed, *variables, call, call)
    with pytest.raises(
        ValueError, match=r"variable ~/seen from float32\[0, 4\] to float32\[6, 4\]"
    ):
        model.train_fn(model.params, {"inputs": jnp.ones((6, 4))}, model.state)
