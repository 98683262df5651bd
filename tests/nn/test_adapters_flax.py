import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_adjoints_agree, classified, draw, is_plain, meta_gradient
from comparing import assert_leaves_close
from flax import linen, nnx

import jaxmaml
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


class Recurrent(nnx.Module):
    """The last output of a recurrent cell, `[num_examples, time, 3]` to `[num_examples, 3]`."""

    def __init__(self, cell):
        rngs = nnx.Rngs(0)
        self.rnn = nnx.RNN(cell(3, 4, param_dtype=jnp.float64, rngs=rngs))
        self.head = nnx.Linear(4, 3, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, inputs):
        return self.head(jnp.asarray(self.rnn(inputs))[:, -1])


def attend(query, key, value, **_):
    """Scaled dot-product attention; that of Flax rounds its softmax to float32."""
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


def test_nnx_state_is_that_of_the_module():
    module, inputs = NormedNNX(nnx.Rngs(0)), draw(0, 8, 3)
    model = nn.from_nnx_with_state(module)
    assert is_plain(model.params)
    assert is_plain(model.state)
    assert set(model.state) == {"norm"}
    outputs, new_state = jax.jit(model.train_fn)(model.params, {"inputs": inputs}, model.state)
    np.testing.assert_array_equal(module.norm.mean[...], 0)
    assert_leaves_close(outputs, module(inputs))
    assert_leaves_close(
        new_state, {"norm": {"mean": module.norm.mean[...], "var": module.norm.var[...]}}
    )
    assert abs(new_state["norm"]["mean"]).max() > 1e-4


def test_an_nnx_module_has_two_modes_and_stays_as_it_is():
    module, inputs = NormedNNX(nnx.Rngs(0)), draw(0, 8, 3)
    model = nn.from_nnx_with_state(module)
    assert not module.norm.use_running_average
    assert not module.dropout.deterministic
    unchanged = (module.dense(inputs) - 0) / np.sqrt(1 + 1e-5)
    outputs, new_state = model.test_fn(model.params, {"inputs": inputs}, model.state)
    assert_leaves_close(outputs, unchanged)
    assert_leaves_close(new_state, model.state)
    outputs, _ = model.train_fn(model.params, {"inputs": inputs}, model.state)
    assert_leaves_close(outputs.mean(0), np.zeros(4))


def test_a_frozen_part_of_an_nnx_module_stays_frozen_in_training():
    module, inputs = NormedNNX(nnx.Rngs(0)), draw(0, 8, 3)
    module.norm.eval()
    model = nn.from_nnx_with_state(module)
    _, state = model.train_fn(model.params, {"inputs": inputs}, model.state)
    assert_leaves_close(state, model.state)


def test_nnx_without_state_keeps_the_mode_of_the_module():
    module, batch = DroppedNNX(nnx.Rngs(0)), {"inputs": draw(0, 8, 3)}
    dropping, params = nn.from_nnx(module)
    module.eval()
    evaluating, _ = nn.from_nnx(module)
    assert_leaves_close(evaluating(params, batch), module.dense(batch["inputs"]))
    assert 0.4 < (dropping(params, batch) == 0).mean() < 0.6


def test_nnx_dropout_has_two_modes_and_no_state():
    model = nn.from_nnx_with_state(DroppedNNX(nnx.Rngs(0)), with_key)
    assert model.state == {}
    batch = {"inputs": draw(0, 8, 3), "key": jax.random.key(0)}
    trained, state = model.train_fn(model.params, batch, model.state)
    tested, _ = model.test_fn(model.params, batch, model.state)
    assert state == {}
    assert 0.4 < (trained == 0).mean() < 0.6
    assert (tested != 0).all()


def test_nnx_random_state_is_a_constant():
    apply_fn, params = nn.from_nnx(DroppedNNX(nnx.Rngs(0)))
    assert set(params) == {"dense"}
    batch = {"inputs": draw(0, 8, 3)}
    first, second = (jax.jit(apply_fn)(params, batch) for _ in range(2))
    assert (first == 0).any()
    np.testing.assert_array_equal(first, second)


def test_nnx_dropout_key_from_the_batch():
    apply_fn, params = nn.from_nnx(DroppedNNX(nnx.Rngs(0)), with_key)
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
    assert_leaves_close(grads, jax.grad(loss_fn)(params, batch))


def test_nnx_intermediates_are_no_state():
    class Sower(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.eye(3))

        def __call__(self, inputs):
            self.features = nnx.Intermediate(inputs)
            return inputs @ self.kernel[...]

    apply_fn, params = nn.from_nnx(Sower())
    np.testing.assert_array_equal(apply_fn(params, {"inputs": jnp.eye(3)}), jnp.eye(3))


def test_linen_state_is_that_of_the_module():
    module, inputs = NormedLinen(), draw(0, 8, 3)
    variables = module.init(jax.random.key(0), inputs)
    model = nn.from_linen_with_state(module, variables)
    assert is_plain(model.params)
    assert set(model.state) == {"batch_stats"}
    outputs, new_state = jax.jit(model.train_fn)(model.params, {"inputs": inputs}, model.state)
    expected, updates = module.apply(variables, inputs, mutable=["batch_stats"])
    assert_leaves_close(outputs, expected)
    assert_leaves_close(new_state, updates)
    assert "batch_stats" in variables


def test_linen_dropout_key_from_the_batch():
    module, inputs = NormedLinen(rate=0.5), draw(0, 40, 3)
    variables = module.init(jax.random.key(0), inputs)
    model = nn.from_linen_with_state(module, variables)
    keys = jax.random.split(jax.random.key(1), 2)
    apply = lambda key: model.train_fn(model.params, {"inputs": inputs, "key": key}, model.state)
    masks = [apply(key)[0] == 0 for key in keys]
    assert 0.3 < masks[0].mean() < 0.7
    assert (masks[0] != masks[1]).any()


def test_linen_calls_and_weights():
    module, inputs = NormedLinen(), draw(0, 8, 3)
    variables = module.init(jax.random.key(0), inputs)
    doubled, tripled = (lambda m, b, n=n: n * m(b["images"]) for n in (2, 3))
    default = nn.from_linen_with_state(module, variables)
    batch = {"inputs": inputs, "images": inputs, "weights": jnp.arange(8.0)}
    both = nn.from_linen_with_state(module, variables, doubled, tripled)
    one = nn.from_linen_with_state(module, variables, doubled)
    run = lambda fn: fn(default.params, batch, default.state)[0]
    plain = run(default.train_fn)
    np.testing.assert_array_equal(run(default.test_fn), plain)
    for fn, factor in ((both.train_fn, 2), (both.test_fn, 3), (one.train_fn, 2), (one.test_fn, 2)):
        assert_leaves_close(plain, run(fn) / factor * batch["weights"][:, None])


def test_linen_without_state():
    module = linen.Dense(2)
    apply_fn, params = nn.from_linen(module, module.init(jax.random.key(0), jnp.ones((1, 3))))
    inputs = draw(0, 8, 3)
    expected = inputs @ params["kernel"] + params["bias"]
    assert_leaves_close(apply_fn(params, {"inputs": inputs}), expected)


@pytest.mark.parametrize(
    ("build", "error", "named"),
    [
        (lambda: nn.from_nnx(linen.Dense(2)), TypeError, "flax.nnx.Module"),  # type: ignore[arg-type]
        (lambda: nn.from_nnx_with_state(linen.Dense(2)), TypeError, "flax.nnx.Module"),  # type: ignore[arg-type]
        (lambda: nn.from_linen(nnx.Dropout(0.5), {}), TypeError, "flax.linen.Module"),  # type: ignore[arg-type]
        (lambda: nn.from_linen(linen.Dense(2), {"batch_stats": {}}), ValueError, "'params'"),
        (lambda: nn.from_linen_with_state(linen.Dense(2), {}), ValueError, "'params'"),
    ],
)
def test_adapters_name_what_is_wrong(build, error, named):
    with pytest.raises(error, match=named):
        build()


ARCHITECTURES = {
    "lstm": (lambda: Recurrent(nnx.LSTMCell), None),
    "gru": (lambda: Recurrent(nnx.GRUCell), None),
    "transformer": (Transformer, with_key),
}


@pytest.mark.parametrize(
    "name",
    ["gru", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lstm", "transformer"))],
)
def test_both_exact_modes_give_one_meta_gradient(x64, name):
    build, call = ARCHITECTURES[name]
    apply_fn, params = nn.from_nnx(build(), call)
    task = classified(5, 3, key=jax.random.key(0))
    assert_adjoints_agree(nn.cross_entropy(apply_fn), params, task)


def test_dropout_differs_from_key_to_key_and_from_step_to_step(x64):
    apply_fn, params = nn.from_nnx(Transformer(), with_key)
    loss_fn = jax.jit(nn.cross_entropy(apply_fn))
    support = classified(5, 3).support
    task_loss = lambda seed: float(loss_fn(params, {**support, "key": jax.random.key(seed)}))
    assert task_loss(0) == task_loss(0) != task_loss(1)
    still = optax.sgd(0.0)
    _, info = jaxmaml.adapt(loss_fn, params, {**support, "key": jax.random.key(0)}, still, 3)
    assert len(set(np.asarray(info.inner_losses).tolist())) == 3


class SowingLinen(linen.Module):
    """Sows into a collection of its own, into that of its statistics and into intermediates."""

    @linen.compact
    def __call__(self, inputs):
        inputs = linen.BatchNorm(use_running_average=False)(inputs)
        self.sow("metrics", "mean", inputs.mean())
        self.sow("batch_stats", "inputs", inputs)
        self.sow("intermediates", "inputs", inputs)
        return linen.Dense(3)(inputs)


def test_a_linen_module_that_sows_is_adapted_as_if_it_did_not():
    module, task = SowingLinen(), classified(4)
    variables = module.init(jax.random.key(0), jnp.ones((2, 4)))
    statistics = {"BatchNorm_0": variables["batch_stats"]["BatchNorm_0"]}
    plain = nn.from_linen_with_state(
        module, {"params": variables["params"], "batch_stats": statistics}
    )
    model = nn.from_linen_with_state(module, variables)
    (grads, info), (expected, plain_info) = (
        meta_gradient(nn.cross_entropy(m.train_fn), m.params, task, state=m.state)
        for m in (model, plain)
    )
    assert_leaves_close(grads, expected)
    assert jax.tree.structure(info.state) == jax.tree.structure(model.state)
    moved = info.state["batch_stats"]["BatchNorm_0"]
    assert_leaves_close(moved, plain_info.state["batch_stats"]["BatchNorm_0"])
    assert abs(moved["mean"] - statistics["BatchNorm_0"]["mean"]).max() > 1e-6


class SowingDense(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        self.sow("metrics", "mean", inputs.mean())
        return linen.Dense(3)(inputs)


def test_a_linen_module_that_does_nothing_but_sow_carries_no_state():
    module, batch = SowingDense(), classified(4).support
    variables = module.init(jax.random.key(0), jnp.ones((2, 4)))
    assert "metrics" in variables
    apply_fn, params = nn.from_linen(module, variables)
    assert apply_fn(params, batch).shape == (6, 3)


class PairLinen(linen.Module):
    """A variable that holds a tuple without being sown."""

    @linen.compact
    def __call__(self, inputs):
        pair = self.variable("cache", "pair", lambda: (jnp.zeros(()), jnp.ones(())))
        pair.value = (pair.value[0] + 1, pair.value[1])
        return linen.Dense(3)(inputs) * pair.value[1]


def test_a_linen_variable_that_is_a_tuple_is_state():
    module, batch = PairLinen(), classified(4).support
    variables = module.init(jax.random.key(0), jnp.ones((2, 4)))
    model = nn.from_linen_with_state(module, variables)
    _, state = model.train_fn(model.params, batch, model.state)
    assert state["cache"]["pair"][0] == model.state["cache"]["pair"][0] + 1
    apply_fn, params = nn.from_linen(module, variables)
    with pytest.raises(flax.errors.FlaxError):
        apply_fn(params, batch)


class GrowingLinen(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        seen = self.variable("cache", "seen", lambda: jnp.zeros((0, 4)))
        seen.value = jnp.concatenate([seen.value, inputs])
        return linen.Dense(3)(inputs)


def test_a_linen_variable_that_grows_is_refused_by_its_name():
    module = GrowingLinen()
    model = nn.from_linen_with_state(module, module.init(jax.random.key(0), jnp.ones((2, 4))))
    with pytest.raises(
        ValueError, match=r"variable cache/seen from float32\[2, 4\] to float32\[8, 4"
    ):
        model.train_fn(model.params, classified(4).support, model.state)


class Metric(nnx.Variable):
    pass


class SowingNNX(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.linear = nnx.Linear(4, 3, rngs=nnx.Rngs(1))

    def __call__(self, inputs):
        normed = self.norm(inputs)
        self.sow(Metric, "mean", normed.mean())
        return self.linear(normed)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("num_calls", [0, 2])
def test_an_nnx_module_that_sows_is_adapted(num_calls):
    module, task = SowingNNX(), classified(4)
    for _ in range(num_calls):
        module(task.support["inputs"])
    model = nn.from_nnx_with_state(module)
    learner = jaxmaml.maml(nn.cross_entropy(model.train_fn), optax.sgd(0.1), 3)
    _, info = jax.eval_shape(learner.loss, model.params, task, state=model.state)
    assert jax.tree.structure(info.state) == jax.tree.structure(model.state)
