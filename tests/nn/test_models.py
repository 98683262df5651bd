import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import (
    NETWORKS,
    assert_network_is,
    draw,
    jitter,
    paper_conv4,
    plain_conv,
    plain_norm,
    plain_pool,
)
from flax import nnx

from jaxmaml import nn, trees
from jaxmaml.nn.norm import POLICIES


@pytest.fixture
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


def plain_conv4(params, x, pooled):
    for conv, norm in zip(params["conv"].values(), params["norm"].values(), strict=True):
        x = plain_norm(plain_conv(conv, x, 1 if pooled else 2)) + norm["offset"]
        x = jnp.maximum(x, 0)
        x = plain_pool(x) if pooled else x
    return x.reshape(len(x), -1) if pooled else x.mean((1, 2))


CONV4 = {
    "stride 2": lambda: paper_conv4(False, param_dtype=jnp.float64),
    "pooled": lambda: paper_conv4(True, conv_bias=True, param_dtype=jnp.float64),
}


@pytest.mark.parametrize("name", CONV4)
def test_conv4_is_the_network_in_plain_jax(x64, name):
    assert_network_is(CONV4[name](), lambda params, x: plain_conv4(params, x, name == "pooled"))


def test_mlp_with_the_papers_values_is_the_papers_network(x64):
    module = nn.MLP(
        12, 5, hidden=(9, 7), norm="transductive", norm_scale=False, param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    apply_fn, params = nn.from_nnx(module)
    params, inputs = jitter(params), draw(1, 10, 4, 3)
    x = inputs.reshape(10, 12)
    for i in range(2):
        x = x @ params["dense"][i]["kernel"]
        x = jnp.maximum(plain_norm(x) + params["norm"][i]["offset"], 0)
    expected = x @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(apply_fn(params, {"inputs": inputs}), expected, rtol=1e-11)


def test_parameter_paths_and_counts():
    def count(module):
        params = nn.from_nnx(module)[1]
        return set(trees.leaf_paths(params)), sum(leaf.size for leaf in jax.tree.leaves(params))

    names, size = count(nn.Conv4(5, norm_scale=False, conv_bias=True, rngs=nnx.Rngs(0)))
    layers = [f"{name}/{i}" for name in ("conv", "norm") for i in range(4)]
    expected = {f"{layer}/{leaf}" for layer in layers[:4] for leaf in ("kernel", "bias")}
    expected |= {f"{layer}/offset" for layer in layers[4:]}
    assert names == expected | {"head/kernel", "head/bias"}
    assert size == 640 + 3 * 36_928 + 4 * 64 + 325
    names, _ = count(nn.Conv4(5, rngs=nnx.Rngs(0)))
    assert "norm/3/scale" in names
    assert "conv/0/bias" not in names
    names, size = count(nn.MLP(1, 1, rngs=nnx.Rngs(0)))
    dense = {f"dense/{i}/{leaf}" for i in range(2) for leaf in ("kernel", "bias")}
    assert names == dense | {"head/kernel", "head/bias"}
    assert size == 80 + 1640 + 41


@pytest.mark.parametrize("policy", POLICIES)
def test_normalization_decides_by_default_whether_there_are_biases(policy):
    options = {"norm": policy, "num_steps": 2 if policy == "per_step" else None}
    build = {
        "conv": lambda **bias: nn.Conv4(5, num_filters=10, rngs=nnx.Rngs(0), **options, **bias),
        "dense": lambda **bias: nn.MLP(4, 1, hidden=(9,), rngs=nnx.Rngs(0), **options, **bias),
    }
    params_of = lambda module: nn.from_nnx_with_state(module).params
    names = {name: trees.leaf_paths(params_of(module())) for name, module in build.items()}
    normed = {name for name in names["dense"] if name.startswith("norm")}
    assert normed == (set() if policy == "none" else {"norm/0/offset", "norm/0/scale"})
    has_bias = policy in ("layer", "group", "none")
    assert ("conv/0/bias" in names["conv"]) == has_bias
    assert ("dense/0/bias" in names["dense"]) == has_bias
    told = params_of(build["conv"](conv_bias=not has_bias))["conv"][0]
    assert ("bias" in told) != has_bias
    told = params_of(build["dense"](hidden_bias=not has_bias))["dense"][0]
    assert ("bias" in told) != has_bias


def test_miniimagenet_network_has_the_papers_800_features():
    module = nn.Conv4(5, image_shape=(84, 84, 3), num_filters=32, pooled=True, rngs=nnx.Rngs(0))
    assert module.head.kernel.shape == (800, 5)


def test_initial_parameters():
    _, params = nn.from_nnx(nn.Conv4(200, rngs=nnx.Rngs(0)))
    bound = np.sqrt(6 / (9 * 64 + 9 * 64))
    kernel = params["conv"][1]["kernel"]
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    np.testing.assert_allclose(params["head"]["kernel"].std(), 0.01, rtol=0.05)
    assert not params["head"]["bias"].any()
    paper = nn.Conv4(200, head_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(paper.head.kernel[...].std(), 1, rtol=0.05)
    small = nnx.initializers.normal(0.5)
    mlp = nn.MLP(100, 100, hidden=(100,), hidden_init=small, head_init=small, rngs=nnx.Rngs(0))
    for kernel in (mlp.dense[0].kernel[...], mlp.head.kernel[...]):
        np.testing.assert_allclose(kernel.std(), 0.5, rtol=0.05)


def test_normalization_cancels_the_convolution_bias(x64):
    apply_fn, params = nn.from_nnx(paper_conv4(False, conv_bias=True, param_dtype=jnp.float64))
    inputs = draw(1, 10, 20, 17, 2)
    biased = jax.tree.map(lambda x: x, params)
    biased["conv"][2]["bias"] += 3.0
    outputs = jax.jit(lambda params: apply_fn(params, {"inputs": inputs}))
    np.testing.assert_allclose(outputs(biased), outputs(params), rtol=1e-9)


@pytest.mark.parametrize("weights", [{}, {"weights": jnp.array([1.0, 0.0, 2.0, 1.0])}])
def test_constant_inputs_have_finite_first_and_second_derivatives(weights):
    apply_fn, params = nn.from_nnx(nn.MLP(3, 2, norm="transductive", rngs=nnx.Rngs(0)))
    inputs = jnp.full((4, 3), 0.5)

    def loss(params, inputs):
        return (apply_fn(params, {"inputs": inputs, **weights}) ** 2).sum()

    tangents = jax.tree.map(jnp.ones_like, (params, inputs))
    values = jax.jit(lambda: jax.jvp(jax.grad(loss, (0, 1)), (params, inputs), tangents))()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(values))


@pytest.mark.parametrize("name", NETWORKS)
def test_padding_has_no_influence_whatever_it_holds(name):
    module, inputs = NETWORKS[name](jnp.float32), draw(0, 6, 20, 17, 2).astype(jnp.float32)
    weights = jnp.array([1.0, 0, 1, 1, 0.5, 0])
    apply = jax.jit(module)
    outputs = apply(inputs, weights)
    for junk in (1e6, jnp.nan, jnp.inf):
        padded = apply(inputs.at[jnp.array([1, 5])].set(junk), weights)
        np.testing.assert_array_equal(padded, outputs)
    by_batch = name in ("conv4", "conv4-pooled", "mlp-norm", "resnet12")
    assert np.allclose(apply(inputs)[0], outputs[0], atol=1e-6) != by_batch


@pytest.mark.parametrize("name", ["conv4", "mlp"])
def test_a_head_may_be_put_in_with_another_number_of_outputs(name):
    module, inputs = NETWORKS[name](jnp.float32), draw(0, 6, 20, 17, 2).astype(jnp.float32)
    apply_fn, params = nn.from_nnx(module)
    features_fn, _ = nn.from_nnx(module, lambda module, batch: module.features(batch["inputs"]))
    features = jax.jit(features_fn)(params, {"inputs": inputs})
    assert features.shape == (6, module.head.in_features)
    head = {"kernel": draw(1, features.shape[1], 7), "bias": draw(2, 7)}
    outputs = jax.jit(apply_fn)({**params, "head": head}, {"inputs": inputs})
    expected = features @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_dtype_and_ranks(x64, strict_ranks, name):
    apply_fn, initial = nn.from_nnx(NETWORKS[name](jnp.float32))
    for params_dtype, inputs_dtype, expected in [
        (jnp.float32, jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64, jnp.float64),
        (jnp.float32, jnp.float64, jnp.float64),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    ]:
        params = jax.tree.map(lambda x, dtype=params_dtype: np.asarray(x, dtype), initial)
        inputs = {"inputs": jnp.ones((6, 20, 17, 2), inputs_dtype)}
        weighted = inputs | {"weights": jnp.ones(6, inputs_dtype)}
        for batch in (inputs, weighted) if expected == jnp.bfloat16 else (inputs,):
            outputs = jax.eval_shape(apply_fn, params, batch)
            assert outputs.dtype == expected
            assert outputs.shape == (6, 5)
            loss = lambda params, batch: apply_fn(params, batch).sum()
            grads = jax.eval_shape(jax.grad(loss), params, batch)
            assert all(grad.dtype == params_dtype for grad in jax.tree.leaves(grads))


def test_integer_images_are_promoted():
    module = NETWORKS["conv4"](jnp.float32)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 20, 17, 2)), jnp.uint8)
    apply = jax.jit(module)
    np.testing.assert_allclose(apply(images), apply(images.astype(jnp.float32)), rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: nn.Conv4(0, rngs=nnx.Rngs(0)), "way"),
        (lambda: nn.Conv4(5, num_filters=0, rngs=nnx.Rngs(0)), "num_filters"),
        (lambda: nn.Conv4(5, image_shape=(28, 28), rngs=nnx.Rngs(0)), "image_shape"),
        (
            lambda: nn.Conv4(5, image_shape=(15, 28, 1), pooled=True, rngs=nnx.Rngs(0)),
            "at least 16",
        ),
        (lambda: nn.MLP(0, 1, rngs=nnx.Rngs(0)), "num_inputs"),
        (lambda: nn.MLP(1, 1, hidden=(40, 0), rngs=nnx.Rngs(0)), "hidden"),
        (lambda: nn.Conv4(5, rngs=nnx.Rngs(0))(jnp.ones((2, 28, 28, 3))), "inputs"),
        (lambda: nn.Conv4(5, rngs=nnx.Rngs(0))(jnp.ones((28, 28, 1))), "inputs"),
        (lambda: nn.MLP(2, 1, rngs=nnx.Rngs(0))(jnp.ones((4, 3))), "inputs"),
        (lambda: nn.MLP(2, 1, rngs=nnx.Rngs(0))(jnp.ones((4, 2)), jnp.ones(3)), "weights"),
        (lambda: nn.MLP(2, 1, rngs=nnx.Rngs(0))(jnp.ones((4, 2)), jnp.ones((4, 1))), "weights"),
    ],
)
def test_models_name_what_is_wrong(build, named):
    with pytest.raises(ValueError, match=named):
        build()
