import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jaxmaml import nn


class NormedNNX(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs):
        return self.norm(self.dense(inputs))


class DroppedNNX(nnx.Module):
    """Holds a random stream of its own, and takes keys too."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 50, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, inputs, rngs=None):
        return self.dropout(self.dense(inputs), rngs=rngs)


class NormedLinen(linen.Module):
    rate: float = 0.0

    @linen.compact
    def __call__(self, inputs, weights=None):
        outputs = linen.Dense(4)(inputs)
        outputs = linen.BatchNorm(use_running_average=False)(outputs)
        outputs = linen.Dropout(self.rate, deterministic=False)(outputs)
        return outputs if weights is None else outputs * weights[:, None]


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_trees_close(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected
    )


def is_plain(tree):
    if isinstance(tree, jax.Array):
        return True
    return type(tree) is dict and all(is_plain(value) for value in tree.values())


def test_nnx_state_is_that_of_the_module():
    module, inputs = NormedNNX(nnx.Rngs(0)), draw(0, 8, 3)
    apply_fn, params, state = nn.from_nnx(module)
    assert is_plain(params)
    assert is_plain(state)
    assert set(state) == {"norm"}
    outputs, new_state = jax.jit(apply_fn)(params, {"inputs": inputs}, state)
    np.testing.assert_array_equal(module.norm.mean[...], 0)
    assert_trees_close(outputs, module(inputs))
    assert_trees_close(
        new_state, {"norm": {"mean": module.norm.mean[...], "var": module.norm.var[...]}}
    )
    assert abs(new_state["norm"]["mean"]).max() > 1e-4


def test_nnx_state_goes_through_a_scan_of_gradient_steps_under_vmap():
    apply_fn, params, state = nn.from_nnx(NormedNNX(nnx.Rngs(0)))
    loss_fn = nn.mean_squared_error(apply_fn, has_state=True)
    tasks = {"inputs": draw(1, 3, 8, 3), "targets": draw(2, 3, 8, 4)}

    def adapt(batch):
        def step(carry, _):
            params, state = carry
            grads, state = jax.grad(loss_fn, has_aux=True)(params, batch, state)
            return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state), None

        return jax.lax.scan(step, (params, state), None, length=2)[0]

    adapted, states = jax.jit(jax.vmap(adapt))(tasks)
    looped = [adapt(jax.tree.map(lambda leaf, i=i: leaf[i], tasks)) for i in range(3)]
    assert_trees_close((adapted, states), jax.tree.map(lambda *x: jnp.stack(x), *looped))


def test_nnx_evaluation_mode_is_kept():
    module, inputs = NormedNNX(nnx.Rngs(0)), draw(0, 8, 3)
    module.eval()
    apply_fn, params, state = nn.from_nnx(module)
    outputs, new_state = apply_fn(params, {"inputs": inputs}, state)
    assert_trees_close(outputs, module.dense(inputs) / np.sqrt(1 + 1e-5))
    assert_trees_close(new_state, state)


def test_nnx_random_state_is_a_constant():
    apply_fn, params, state = nn.from_nnx(DroppedNNX(nnx.Rngs(0)))
    assert state == ()
    assert set(params) == {"dense"}
    batch = {"inputs": draw(0, 8, 3)}
    first, second = (jax.jit(apply_fn)(params, batch) for _ in range(2))
    assert (first == 0).any()
    np.testing.assert_array_equal(first, second)


def test_nnx_dropout_key_from_the_batch():
    def call(module, batch):
        return module(batch["inputs"], rngs=nnx.Rngs(dropout=batch["key"]))

    apply_fn, params, _ = nn.from_nnx(DroppedNNX(nnx.Rngs(0)), call)
    keys = jax.random.split(jax.random.key(1), 2)
    inputs = draw(0, 8, 3)
    masks = [apply_fn(params, {"inputs": inputs, "key": key}) == 0 for key in keys]
    assert 0.4 < masks[0].mean() < 0.6
    assert (masks[0] != masks[1]).any()
    batched = jax.jit(jax.vmap(lambda key: apply_fn(params, {"inputs": inputs, "key": key})))
    np.testing.assert_array_equal(batched(keys) == 0, jnp.stack(masks))
    loss_fn = nn.mean_squared_error(apply_fn)
    batch = {"inputs": inputs, "targets": draw(1, 8, 50), "key": keys[0]}
    grads = jax.grad(loss_fn)(params, batch | {"weights": jnp.ones(8)})
    assert_trees_close(grads, jax.grad(loss_fn)(params, batch))


def test_nnx_intermediates_are_no_state():
    class Sower(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.eye(3))

        def __call__(self, inputs):
            self.features = nnx.Intermediate(inputs)
            return inputs @ self.kernel[...]

    apply_fn, params, state = nn.from_nnx(Sower())
    assert state == ()
    np.testing.assert_array_equal(apply_fn(params, {"inputs": jnp.eye(3)}), jnp.eye(3))


def test_linen_state_is_that_of_the_module():
    model, inputs = NormedLinen(), draw(0, 8, 3)
    variables = model.init(jax.random.key(0), inputs)
    apply_fn, params, state = nn.from_linen(model, variables)
    assert is_plain(params)
    assert set(state) == {"batch_stats"}
    outputs, new_state = jax.jit(apply_fn)(params, {"inputs": inputs}, state)
    expected, updates = model.apply(variables, inputs, mutable=["batch_stats"])
    assert_trees_close(outputs, expected)
    assert_trees_close(new_state, updates)
    assert "batch_stats" in variables


def test_linen_dropout_key_from_the_batch():
    model, inputs = NormedLinen(rate=0.5), draw(0, 40, 3)
    variables = model.init(jax.random.key(0), inputs)
    apply_fn, params, state = nn.from_linen(model, variables)
    keys = jax.random.split(jax.random.key(1), 2)
    masks = [apply_fn(params, {"inputs": inputs, "key": key}, state)[0] == 0 for key in keys]
    assert 0.3 < masks[0].mean() < 0.7
    assert (masks[0] != masks[1]).any()


def test_linen_call_and_weights():
    model, inputs = NormedLinen(), draw(0, 8, 3)
    variables = model.init(jax.random.key(0), inputs)
    apply_fn, params, state = nn.from_linen(model, variables)
    batch = {"inputs": inputs, "weights": jnp.arange(8.0)}
    weighted, _ = apply_fn(params, batch, state)
    doubled, _, _ = nn.from_linen(model, variables, lambda m, b: 2 * m(b["images"]))
    outputs, _ = doubled(params, {"images": inputs}, state)
    assert_trees_close(weighted, outputs / 2 * batch["weights"][:, None])


def test_linen_without_state():
    model = linen.Dense(2)
    apply_fn, params, state = nn.from_linen(model, model.init(jax.random.key(0), jnp.ones((1, 3))))
    assert state == ()
    inputs = draw(0, 8, 3)
    expected = inputs @ params["kernel"] + params["bias"]
    assert_trees_close(apply_fn(params, {"inputs": inputs}), expected)


def test_weights_go_to_models_that_take_them():
    module, batch = nn.MLP(3, 2, norm="transductive", rngs=nnx.Rngs(0)), {"inputs": draw(0, 8, 3)}
    weights = jnp.arange(8.0)
    apply_fn, params, _ = nn.from_nnx(module)
    assert_trees_close(
        apply_fn(params, batch | {"weights": weights}), module(batch["inputs"], weights)
    )
    ignoring, params, _ = nn.from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    assert_trees_close(ignoring(params, batch | {"weights": weights}), ignoring(params, batch))
    taking = nn.from_function(lambda params, inputs, weights=None: weights)
    assert taking(None, batch | {"weights": 3}) == 3
    assert taking(None, batch) is None


@pytest.mark.parametrize(
    ("build", "error", "named"),
    [
        (lambda: nn.from_nnx(linen.Dense(2)), TypeError, "flax.nnx.Module"),  # type: ignore[arg-type]
        (lambda: nn.from_linen(nnx.Dropout(0.5), {}), TypeError, "flax.linen.Module"),  # type: ignore[arg-type]
        (lambda: nn.from_linen(linen.Dense(2), {"batch_stats": {}}), ValueError, "'params'"),
        (lambda: nn.from_function(lambda p, x: x)(0, jnp.ones(3)), ValueError, "'inputs'"),
    ],
)
def test_adapters_name_what_is_wrong(build, error, named):
    with pytest.raises(error, match=named):
        build()


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
        apply_fn, params, _ = nn.from_nnx(Net(), compute_dtype=jnp.bfloat16)
    elif adapter == "linen":
        variables = LinenNet().init(jax.random.key(0), inputs)
        apply_fn, params, _ = nn.from_linen(LinenNet(), variables, compute_dtype=jnp.bfloat16)
    else:
        apply_fn = nn.from_function(model, compute_dtype=jnp.bfloat16)
        params = jnp.ones((3, 2))
    loss_fn = nn.mean_squared_error(apply_fn)
    batch = {"inputs": inputs, "targets": jnp.zeros((4, 2)), "count": jnp.arange(4)}
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    assert seen[-1] == (jnp.bfloat16, jnp.bfloat16)
    assert loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def test_first_ways_cuts_the_logits():
    def stateful(params, batch, state):
        return batch["inputs"] @ params, state + 1

    params, batch = draw(0, 3, 5), {"inputs": draw(1, 4, 3)}
    plain = nn.from_function(lambda params, inputs: inputs @ params)
    expected = plain(params, batch)[:, :2]
    np.testing.assert_array_equal(nn.first_ways(plain, 2)(params, batch), expected)
    logits, state = nn.first_ways(stateful, 2, has_state=True)(params, batch, 6)
    np.testing.assert_array_equal(logits, expected)
    assert state == 7
    with pytest.raises(ValueError, match=r"a head of 5 ways cannot serve 20; only .*protonet"):
        jax.eval_shape(nn.first_ways(plain, 20), params, batch)
    with pytest.raises(ValueError, match="way must be at least 1"):
        nn.first_ways(plain, 0)
