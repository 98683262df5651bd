"""The contract of all adapters, `from_function` and `first_ways`."""

import inspect

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    REFUSED,
    WITH_STATE,
    classified,
    draw,
    is_finite,
    meta_gradient,
    stacked,
)
from comparing import assert_leaves_close
from flax import linen, nnx

import jaxmaml
from jaxmaml import nn
from jaxmaml.nn import adapters
from jaxmaml.types import carries_state, with_state


def batch_of(seed, **extra):
    return {"inputs": 2 + draw(seed, 8, 4).astype(jnp.float32), **extra}


@pytest.mark.parametrize("library", REFUSED)
def test_a_model_with_state_is_refused_with_the_adapter_to_use(library):
    build, error, named = REFUSED[library]
    with pytest.raises(error, match=named):
        build()


@pytest.mark.parametrize("library", WITH_STATE)
def test_both_functions_of_a_stateful_model_are_marked(library):
    model = WITH_STATE[library]()
    assert carries_state(model.train_fn)
    assert carries_state(model.test_fn)
    assert carries_state(nn.cross_entropy(model.train_fn))
    assert carries_state(nn.accuracy(nn.first_ways(model.test_fn, 2)))


@pytest.mark.parametrize("library", WITH_STATE)
def test_training_mode_normalizes_with_the_batch_and_moves_the_state(library):
    model, batch = WITH_STATE[library](), batch_of(0)
    outputs, state = jax.jit(model.train_fn)(model.params, batch, model.state)
    # Outputs do not see a shift of all examples, but they see a change of the others.
    shifted, _ = model.train_fn(model.params, {"inputs": batch["inputs"] + 5}, model.state)
    np.testing.assert_allclose(shifted, outputs, rtol=1e-3, atol=1e-3)
    others = batch["inputs"].at[1:].multiply(3)
    changed, _ = model.train_fn(model.params, {"inputs": others}, model.state)
    assert not np.allclose(changed[0], outputs[0], atol=1e-2)
    assert jax.tree.structure(state) == jax.tree.structure(model.state)
    moved = jax.tree.map(lambda a, b: abs(a - b).max(), state, model.state)
    assert max(float(leaf) for leaf in jax.tree.leaves(moved)) > 0.1


@pytest.mark.parametrize("library", WITH_STATE)
def test_evaluation_mode_normalizes_with_the_state_and_keeps_it(library):
    model, batch = WITH_STATE[library](), batch_of(1)
    _, state = model.train_fn(model.params, {"inputs": 1 + 2 * batch["inputs"]}, model.state)
    trained, _ = model.train_fn(model.params, batch, state)
    outputs, kept = jax.jit(model.test_fn)(model.params, batch, state)
    assert not np.allclose(outputs, trained, atol=1e-2)
    assert_leaves_close(kept, state, rtol=0, atol=0)
    others = batch["inputs"].at[1:].multiply(3)
    changed, _ = model.test_fn(model.params, {"inputs": others}, state)
    np.testing.assert_allclose(changed[0], outputs[0], rtol=1e-5, atol=1e-6)
    _, later = model.train_fn(model.params, {"inputs": 3 * batch["inputs"]}, state)
    assert not np.allclose(model.test_fn(model.params, batch, later)[0], outputs, atol=1e-2)


@pytest.mark.parametrize("library", WITH_STATE)
def test_a_state_can_be_used_again_after_either_function(library):
    model, batch = WITH_STATE[library](), batch_of(0)
    _, state = model.train_fn(model.params, batch, model.state)
    for fn in (model.train_fn, model.test_fn):
        first, _ = fn(model.params, batch, state)
        again, _ = fn(model.params, batch, state)
        np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("library", WITH_STATE)
def test_state_goes_through_a_scan_of_gradient_steps_under_vmap(library):
    model = WITH_STATE[library]()
    loss_fn = nn.mean_squared_error(model.train_fn)
    draws = (draw(seed, 3, 8, size).astype(jnp.float32) for seed, size in ((1, 4), (2, 3)))
    tasks = dict(zip(("inputs", "targets"), draws, strict=True))

    def adapt(batch):
        def step(carry, _):
            params, state = carry
            grads, state = jax.grad(loss_fn, has_aux=True)(params, batch, state)
            return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state), None

        return jax.lax.scan(step, (model.params, model.state), None, length=2)[0]

    adapted, states = jax.jit(jax.vmap(adapt))(tasks)
    alone = jax.jit(adapt)
    looped = [alone(jax.tree.map(lambda leaf, i=i: leaf[i], tasks)) for i in range(3)]
    assert_leaves_close((adapted, states), stacked(*looped))


@pytest.mark.parametrize(
    "library",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("linen", "haiku") else ())
        for name in WITH_STATE
    ],
)
def test_state_goes_from_the_support_to_the_query_and_through_an_outer_step(library):
    model, optimizer = WITH_STATE[library](), optax.adam(1e-2)
    loss_fn, query_loss_fn = map(nn.cross_entropy, (model.train_fn, model.test_fn))
    options = {"query_loss_fn": query_loss_fn, "state": model.state}
    task = classified(4)
    grads, info = meta_gradient(loss_fn, model.params, task, **options)
    assert is_finite(grads)
    params, state = model.params, model.state
    for _ in range(2):
        inner, state = jax.grad(loss_fn, has_aux=True)(params, task.support, state)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, inner)
    assert_leaves_close(info.query_loss, query_loss_fn(params, task.query, state)[0])
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 2, query_loss_fn=query_loss_fn)
    meta_state = jaxmaml.init_state(learner, optimizer, model.params, model.state)
    step = jax.jit(lambda state: jaxmaml.meta_step(learner, optimizer, state, stacked(task)))
    meta_state, metrics = step(meta_state)
    assert is_finite((meta_state.params, metrics))
    assert_leaves_close(meta_state.state, state)


@pytest.mark.parametrize("library", WITH_STATE)
def test_compute_dtype_leaves_the_outputs_and_the_state_in_float32(library):
    exact, low = WITH_STATE[library](), WITH_STATE[library](compute_dtype=jnp.bfloat16)
    expected, _ = exact.train_fn(exact.params, batch_of(0), exact.state)
    outputs, state = low.train_fn(low.params, batch_of(0), low.state)
    assert outputs.dtype == jnp.float32
    np.testing.assert_allclose(outputs, expected, atol=0.1)
    assert not np.array_equal(outputs, expected)
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert dtypes(state) == dtypes(low.state)


def test_an_apply_fn_is_a_plain_function_with_an_identity():
    transformed = hk.transform(lambda inputs: hk.Linear(3)(inputs))
    module = linen.Dense(3)
    inputs = jnp.ones((1, 4))
    builds = {
        "nnx": lambda: nn.from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0))),
        "linen": lambda: nn.from_linen(module, module.init(jax.random.key(0), inputs)),
        "equinox": lambda: nn.from_equinox(eqx.nn.Linear(4, 3, key=jax.random.key(0))),
        "haiku": lambda: nn.from_haiku(transformed, transformed.init(jax.random.key(0), inputs)),
    }
    for build in builds.values():
        (first, params), (second, _) = build(), build()
        assert inspect.isfunction(first)
        assert first(params, {"inputs": inputs}).shape == (1, 3)
        assert len({first, second, first}) == 2


@pytest.mark.parametrize("adapter", ["nnx", "linen", "function"])
def test_compute_dtype_is_that_of_the_model_alone(adapter):
    seen = []

    def model(params, inputs):
        seen.append((params.dtype, inputs.dtype))
        return inputs @ params

    class Net(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones((3, 2)))

        def __call__(self, inputs):
            return model(self.w[...], inputs)

    class LinenNet(linen.Module):
        @linen.compact
        def __call__(self, inputs):
            return model(self.param("w", lambda _: jnp.ones((3, 2))), inputs)

    inputs = jnp.full((4, 3), 1 / 3)
    if adapter == "nnx":
        apply_fn, params = nn.from_nnx(Net(), compute_dtype=jnp.bfloat16)
    elif adapter == "linen":
        variables = LinenNet().init(jax.random.key(0), inputs)
        apply_fn, params = nn.from_linen(LinenNet(), variables, compute_dtype=jnp.bfloat16)
    else:
        apply_fn = nn.from_function(model, compute_dtype=jnp.bfloat16)
        params = jnp.ones((3, 2))
    loss_fn = nn.mean_squared_error(apply_fn)
    batch = {"inputs": inputs, "targets": jnp.zeros((4, 2)), "count": jnp.arange(4)}
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    assert seen[-1] == (jnp.bfloat16, jnp.bfloat16)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_weights_go_to_models_that_take_them():
    module, batch = nn.MLP(3, 2, norm="transductive", rngs=nnx.Rngs(0)), {"inputs": draw(0, 8, 3)}
    weights = jnp.arange(8.0)
    apply_fn, params = nn.from_nnx(module)
    assert_leaves_close(
        apply_fn(params, batch | {"weights": weights}), module(batch["inputs"], weights)
    )
    ignoring, params = nn.from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    assert_leaves_close(ignoring(params, batch | {"weights": weights}), ignoring(params, batch))
    taking = nn.from_function(lambda params, inputs, weights=None: weights)
    assert taking(None, batch | {"weights": 3}) == 3
    assert taking(None, batch) is None


def test_from_function_needs_inputs():
    with pytest.raises(ValueError, match="'inputs'"):
        nn.from_function(lambda p, x: x)(0, jnp.ones(3))


def test_first_ways_cuts_the_logits():
    def stateful(params, batch, state):
        return batch["inputs"] @ params, state + 1

    params, batch = draw(0, 3, 5), {"inputs": draw(1, 4, 3)}
    plain = nn.from_function(lambda params, inputs: inputs @ params)
    expected = plain(params, batch)[:, :2]
    np.testing.assert_array_equal(nn.first_ways(plain, 2)(params, batch), expected)
    marked = nn.first_ways(with_state(stateful), 2)
    assert carries_state(marked)
    logits, state = marked(params, batch, 6)
    np.testing.assert_array_equal(logits, expected)
    assert state == 7
    with pytest.raises(ValueError, match=r"a head of 5 ways cannot serve 20; only .*protonet"):
        jax.eval_shape(nn.first_ways(plain, 20), params, batch)
    with pytest.raises(ValueError, match="way must be an integer, 1 or more"):
        nn.first_ways(plain, 0)


@pytest.mark.parametrize("library", WITH_STATE)
@pytest.mark.parametrize("state", [(), {}, {"other": jnp.zeros(2)}], ids=["none", "empty", "other"])
def test_a_forgotten_state_is_refused_with_what_to_do(library, state):
    model, task = WITH_STATE[library](), classified(4)
    learner = jaxmaml.maml(nn.cross_entropy(model.train_fn), optax.sgd(0.1), 1)
    with pytest.raises(ValueError, match=r"carries the state .*and got .*pass state=model\.state"):
        learner.adapt(model.params, task.support, state=state)


def test_sown_values_are_left_out_and_other_changes_of_the_state_are_refused():
    before = {"a": {"mean": jnp.zeros(2), "seen": (jnp.zeros(3),)}}
    after = {"a": {"mean": jnp.ones(2), "seen": (jnp.zeros(3), jnp.ones(5)), "new": (1.0,)}}
    found = adapters.carried(before, after | {"b": {"c": {"sown": (2.0,)}}})
    assert_leaves_close(found, {"a": {"mean": jnp.ones(2), "seen": (jnp.zeros(3),)}})
    pair = {"a": {"mean": jnp.zeros(2), "seen": (jnp.ones(3),)}}  # a tuple that is a variable
    assert_leaves_close(adapters.carried(before, pair), pair)
    for changed, where in [
        ({"mean": jnp.zeros(5)}, r"a/mean from float32\[2\] to float32\[5\]"),
        ({"mean": jnp.zeros(2, int)}, r"a/mean from float32\[2\] to int32\[2\]"),
        ({"mean": [jnp.zeros(2)]}, "a/mean"),
        ({"count": jnp.zeros(())}, "a/count"),
        ({"seen": (jnp.zeros(4),)}, "a/seen"),
        ({"seen": (jnp.zeros(4), jnp.zeros(4))}, "a/seen"),
    ]:
        with pytest.raises(ValueError, match=f"changes its variable {where}"):
            adapters.carried(before, {"a": changed})


class _Normed(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __init__(self):
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")

    def __call__(self, inputs, state):
        return self.norm(inputs, state)


def _normed(library, call=None):
    """A batch normalization in training mode, that of an adapter's default call."""
    if library == "nnx":
        return nn.from_nnx_with_state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), call)
    if library == "equinox":
        return nn.from_equinox_with_state(*eqx.nn.make_with_state(_Normed)(), call)
    module = linen.BatchNorm(use_running_average=False)
    return nn.from_linen_with_state(module, module.init(jax.random.key(0), jnp.ones((2, 3))), call)


@pytest.mark.parametrize("library", ["nnx", "linen", "equinox"])
def test_batch_statistics_that_would_count_padding_are_refused(library):
    model, batch = _normed(library), {"inputs": draw(0, 8, 3)}
    padded = batch | {"weights": jnp.array([1.0] * 6 + [0.0] * 2)}
    assert model.train_fn(model.params, batch, model.state)[0].shape == (8, 3)
    with pytest.raises(ValueError, match="padded examples would count in its batch statistics"):
        model.train_fn(model.params, padded, model.state)
    # Statistics of earlier batches know nothing of the padding.
    if library != "linen":  # whose two modes are two calls
        assert model.test_fn(model.params, padded, model.state)[0].shape == (8, 3)


def test_a_call_hands_the_weights_on():
    def call(module, batch):
        mask = batch["weights"][:, None] > 0
        return module(batch["inputs"], mask=mask)

    model, inputs = _normed("nnx", call), draw(0, 8, 3)
    padded = {"inputs": inputs, "weights": jnp.array([1.0] * 6 + [0.0] * 2)}
    found = model.train_fn(model.params, padded, model.state)[0][:6]
    plain = _normed("nnx")
    expected = plain.train_fn(plain.params, {"inputs": inputs[:6]}, plain.state)[0]
    assert_leaves_close(found, expected)
