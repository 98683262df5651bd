import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_adjoints_agree, assert_trees_close, classified, draw, jitter, paths
from flax import nnx
from jax import lax

from jaxmaml import nn
from jaxmaml.nn.norm import POLICIES


@pytest.fixture
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


def paper_conv4(pooled, **options):
    return nn.Conv4(
        5,
        image_shape=(20, 17, 2),
        num_filters=6,
        pooled=pooled,
        head_init=nnx.initializers.normal(1.0),
        norm_scale=False,
        rngs=nnx.Rngs(0),
        **options,
    )


def plain_norm(x):
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    return (x - mean) / jnp.sqrt(var + 0.001)


def plain_conv(layer, x, stride=1):
    dimensions = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    x = lax.conv_general_dilated(x, layer["kernel"], strides, "SAME", dimension_numbers=dimensions)
    return x + layer.get("bias", 0)


def plain_pool(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def plain_conv4(params, x, pooled):
    for conv, norm in zip(params["conv"].values(), params["norm"].values(), strict=True):
        x = plain_norm(plain_conv(conv, x, 1 if pooled else 2)) + norm["offset"]
        x = jnp.maximum(x, 0)
        x = plain_pool(x) if pooled else x
    return x.reshape(len(x), -1) if pooled else x.mean((1, 2))


def plain_resnet12(params, x):
    leaky = lambda x: jnp.where(x > 0, x, 0.1 * x)

    def normed(conv, norm, x):
        return plain_norm(plain_conv(conv, x)) * norm["scale"] + norm["offset"]

    for block in params["block"].values():
        shortcut = normed(block["shortcut"], block["shortcut_norm"], x)
        for i in range(3):
            x = normed(block["conv"][i], block["norm"][i], x)
            x = leaky(x) if i < 2 else leaky(x + shortcut)
        x = plain_pool(x)
    return x.mean((1, 2))


def small_resnet12(dtype, **options):
    return nn.ResNet12(
        5, image_shape=(20, 17, 2), num_filters=(3, 6), param_dtype=dtype,
        rngs=nnx.Rngs(0), **options,
    )  # fmt: skip


IMAGE_NETWORKS = {
    "conv4": (
        lambda: paper_conv4(False, param_dtype=jnp.float64),
        lambda params, x: plain_conv4(params, x, False),
    ),
    "conv4-pooled": (
        lambda: paper_conv4(True, conv_bias=True, param_dtype=jnp.float64),
        lambda params, x: plain_conv4(params, x, True),
    ),
    "resnet12": (lambda: small_resnet12(jnp.float64), plain_resnet12),
}


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_image_networks_are_what_they_say_in_plain_jax(x64, name):
    build, plain_features = IMAGE_NETWORKS[name]
    apply_fn, params, state = nn.from_nnx(build())
    params, inputs, target = jitter(params), draw(1, 10, 20, 17, 2), draw(2, 10, 5)
    assert state == ()

    def plain_network(params):
        head = params["head"]
        return plain_features(params, inputs) @ head["kernel"] + head["bias"]

    @jax.jit
    def outputs_and_gradients(params):
        def projected(network):
            def loss(params):
                outputs = network(params)
                return (outputs * target).sum(), outputs

            return jax.grad(loss, has_aux=True)(params)

        return projected(lambda p: apply_fn(p, {"inputs": inputs})), projected(plain_network)

    (grads, ours), (plain_grads, plain) = outputs_and_gradients(params)
    assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours, plain, rtol=1e-11, atol=1e-11)
    assert_trees_close(grads, plain_grads, rtol=1e-8, atol=1e-9)


def test_mlp_with_the_papers_values_is_the_papers_network(x64):
    module = nn.MLP(
        12, 5, hidden=(9, 7), norm="transductive", norm_scale=False, param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    apply_fn, params, _ = nn.from_nnx(module)
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
        return paths(params), sum(leaf.size for leaf in jax.tree.leaves(params))

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
    names, _ = count(small_resnet12(jnp.float32))
    layers = [f"conv/{i}/kernel" for i in range(3)] + ["shortcut/kernel"]
    norms = [*(f"norm/{i}" for i in range(3)), "shortcut_norm"]
    layers += [f"{norm}/{leaf}" for norm in norms for leaf in ("offset", "scale")]
    expected = {f"block/{i}/{layer}" for i in range(2) for layer in layers}
    assert names == expected | {"head/kernel", "head/bias"}


@pytest.mark.parametrize("policy", POLICIES)
def test_normalisation_decides_over_biases_unless_told(policy):
    options = {"norm": policy, "num_steps": 2 if policy == "per_step" else None}
    build = {
        "conv": lambda **bias: nn.Conv4(5, num_filters=2, rngs=nnx.Rngs(0), **options, **bias),
        "dense": lambda **bias: nn.MLP(4, 1, hidden=(9,), rngs=nnx.Rngs(0), **options, **bias),
        "block": lambda: small_resnet12(jnp.float32, **options),
    }
    names = {name: paths(nn.from_nnx(module())[1]) for name, module in build.items()}
    normed = {name for name in names["dense"] if name.startswith("norm")}
    assert normed == (set() if policy == "none" else {"norm/0/offset", "norm/0/scale"})
    has_bias = policy in ("layer", "group", "none")
    assert ("conv/0/bias" in names["conv"]) == has_bias
    assert ("dense/0/bias" in names["dense"]) == has_bias
    assert ("block/0/shortcut/bias" in names["block"]) == has_bias
    told = nn.from_nnx(build["conv"](conv_bias=not has_bias))[1]["conv"][0]
    assert ("bias" in told) != has_bias
    told = nn.from_nnx(build["dense"](hidden_bias=not has_bias))[1]["dense"][0]
    assert ("bias" in told) != has_bias


def test_miniimagenet_network_has_the_papers_800_features():
    module = nn.Conv4(5, image_shape=(84, 84, 3), num_filters=32, pooled=True, rngs=nnx.Rngs(0))
    assert module.head.kernel.shape == (800, 5)


def test_initial_parameters():
    _, params, _ = nn.from_nnx(nn.Conv4(200, rngs=nnx.Rngs(0)))
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


def test_normalisation_cancels_the_convolution_bias(x64):
    apply_fn, params, _ = nn.from_nnx(paper_conv4(False, conv_bias=True, param_dtype=jnp.float64))
    inputs = draw(1, 10, 20, 17, 2)
    biased = jax.tree.map(lambda x: x, params)
    biased["conv"][2]["bias"] += 3.0
    outputs = jax.jit(lambda params: apply_fn(params, {"inputs": inputs}))
    np.testing.assert_allclose(outputs(biased), outputs(params), rtol=1e-9)


@pytest.mark.parametrize("weights", [{}, {"weights": jnp.array([1.0, 0.0, 2.0, 1.0])}])
def test_constant_inputs_have_finite_first_and_second_derivatives(weights):
    apply_fn, params, _ = nn.from_nnx(nn.MLP(3, 2, norm="transductive", rngs=nnx.Rngs(0)))
    inputs = jnp.full((4, 3), 0.5)

    def loss(params, inputs):
        return (apply_fn(params, {"inputs": inputs, **weights}) ** 2).sum()

    tangents = jax.tree.map(jnp.ones_like, (params, inputs))
    values = jax.jit(lambda: jax.jvp(jax.grad(loss, (0, 1)), (params, inputs), tangents))()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(values))


MODULES = {
    "conv4": lambda dtype: nn.Conv4(
        5, image_shape=(20, 17, 2), num_filters=6, param_dtype=dtype, rngs=nnx.Rngs(0)
    ),
    "conv4-pooled": lambda dtype: paper_conv4(True, param_dtype=dtype, conv_bias=True),
    "mlp": lambda dtype: nn.MLP(680, 5, param_dtype=dtype, rngs=nnx.Rngs(0)),
    "mlp-norm": lambda dtype: nn.MLP(
        680, 5, norm="transductive", param_dtype=dtype, rngs=nnx.Rngs(0)
    ),
    "mlp-group": lambda dtype: nn.MLP(680, 5, norm="group", param_dtype=dtype, rngs=nnx.Rngs(0)),
    "resnet12": small_resnet12,
    "resnet12-layer": lambda dtype: small_resnet12(dtype, norm="layer"),
}


@pytest.mark.parametrize("name", MODULES)
def test_padding_has_no_influence_whatever_it_holds(name):
    module, inputs = MODULES[name](jnp.float32), draw(0, 6, 20, 17, 2).astype(jnp.float32)
    weights = jnp.array([1.0, 0, 1, 1, 0.5, 0])
    apply = jax.jit(module)
    outputs = apply(inputs, weights)
    for junk in (1e6, jnp.nan, jnp.inf):
        padded = apply(inputs.at[jnp.array([1, 5])].set(junk), weights)
        np.testing.assert_array_equal(padded, outputs)
    by_batch = name in ("conv4", "conv4-pooled", "mlp-norm", "resnet12")
    assert np.allclose(apply(inputs)[0], outputs[0], atol=1e-6) != by_batch


@pytest.mark.parametrize("name", MODULES)
def test_a_head_may_be_put_in_with_another_number_of_outputs(name):
    module, inputs = MODULES[name](jnp.float32), draw(0, 6, 20, 17, 2).astype(jnp.float32)
    apply_fn, params, _ = nn.from_nnx(module)
    features_fn, _, _ = nn.from_nnx(module, lambda module, batch: module.features(batch["inputs"]))
    features = jax.jit(features_fn)(params, {"inputs": inputs})
    assert features.shape == (6, module.head.in_features)
    head = {"kernel": draw(1, features.shape[1], 7), "bias": draw(2, 7)}
    outputs = jax.jit(apply_fn)({**params, "head": head}, {"inputs": inputs})
    expected = features @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_resnet12_meta_gradient_is_the_same_by_both_adjoints(x64):
    module = nn.ResNet12(
        3, image_shape=(4, 4, 1), num_filters=(2,), param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    apply_fn, params, _ = nn.from_nnx(module)
    assert_adjoints_agree(nn.cross_entropy(apply_fn), jitter(params), classified(4, 4, 1))


@pytest.mark.parametrize("name", MODULES)
def test_dtype_and_ranks(x64, strict_ranks, name):
    apply_fn, initial, _ = nn.from_nnx(MODULES[name](jnp.float32))
    for params_dtype, inputs_dtype, expected in [
        (jnp.float32, jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64, jnp.float64),
        (jnp.float32, jnp.float64, jnp.float64),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    ]:
        params = jax.tree.map(lambda x, dtype=params_dtype: np.asarray(x, dtype), initial)
        inputs = {"inputs": jnp.ones((6, 20, 17, 2), inputs_dtype)}
        for batch in (inputs, inputs | {"weights": jnp.ones(6, inputs_dtype)}):
            outputs = jax.eval_shape(apply_fn, params, batch)
            assert outputs.dtype == expected
            assert outputs.shape == (6, 5)
            loss = lambda params, batch: apply_fn(params, batch).sum()
            grads = jax.eval_shape(jax.grad(loss), params, batch)
            assert all(grad.dtype == params_dtype for grad in jax.tree.leaves(grads))


def test_integer_images_are_promoted():
    module = MODULES["conv4"](jnp.float32)
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
        (lambda: nn.ResNet12(5, num_filters=(), rngs=nnx.Rngs(0)), "num_filters"),
        (lambda: nn.ResNet12(5, image_shape=(28, 15, 1), rngs=nnx.Rngs(0)), "at least 16"),
        (lambda: small_resnet12(jnp.float32)(jnp.ones((2, 28, 28, 3))), "inputs"),
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
