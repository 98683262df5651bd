import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from jaxmaml import nn
from jaxmaml.nn.models import BatchStatisticsNorm


@pytest.fixture
def strict_ranks():
    with jax.numpy_rank_promotion("raise"):
        yield


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def paths(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}


def jitter(params):
    """Moves zero biases and unit scales, lest a term left out go unnoticed."""
    leaves, treedef = jax.tree.flatten(params)
    moved = [leaf + 0.1 * draw(i, *leaf.shape).astype(leaf.dtype) for i, leaf in enumerate(leaves)]
    return treedef.unflatten(moved)


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


def plain_conv4(params, x, pooled):
    for i in range(4):
        dimensions = ("NHWC", "HWIO", "NHWC")
        strides = (1, 1) if pooled else (2, 2)
        kernel = params["conv"][i]["kernel"]
        x = lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=dimensions)
        if "bias" in params["conv"][i]:
            x = x + params["conv"][i]["bias"]
        x = jnp.maximum(plain_norm(x) + params["norm"][i]["offset"], 0)
        if pooled:
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.reshape(len(x), -1) if pooled else x.mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize(("pooled", "conv_bias"), [(False, False), (True, True)])
def test_conv4_with_the_papers_values_is_the_papers_network(x64, pooled, conv_bias):
    module = paper_conv4(pooled, conv_bias=conv_bias, param_dtype=jnp.float64)
    apply_fn, params, state = nn.from_nnx(module)
    params, inputs, target = jitter(params), draw(1, 10, 20, 17, 2), draw(2, 10, 5)
    assert state == ()

    @jax.jit
    def outputs_and_gradients(params):
        def projected(network):
            def loss(params):
                outputs = network(params)
                return (outputs * target).sum(), outputs

            return jax.grad(loss, has_aux=True)(params)

        return projected(lambda p: apply_fn(p, {"inputs": inputs})), projected(
            lambda p: plain_conv4(p, inputs, pooled)
        )

    (grads, ours), (plain_grads, plain) = outputs_and_gradients(params)
    assert ours.dtype == jnp.float64
    np.testing.assert_allclose(ours, plain, rtol=1e-11, atol=1e-11)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9), grads, plain_grads
    )


def test_mlp_with_the_papers_values_is_the_papers_network(x64):
    module = nn.MLP(
        12, 5, hidden=(9, 7), norm=True, norm_scale=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
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
    names, _ = count(nn.MLP(4, 1, norm=True, rngs=nnx.Rngs(0)))
    assert {"norm/1/offset", "norm/1/scale"} <= names
    assert "dense/0/bias" not in names
    assert "dense/0/bias" in count(nn.MLP(4, 1, norm=True, hidden_bias=True, rngs=nnx.Rngs(0)))[0]


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


@pytest.mark.parametrize("weights", [None, jnp.ones(4000)])
def test_norm_is_accurate_where_the_mean_is_large(weights):
    values = draw(0, 4000, 2).astype(jnp.float32) + 3000
    exact = np.asarray(values, np.float64)
    exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-3)
    normed = BatchStatisticsNorm(2)(values, weights)
    np.testing.assert_allclose(normed, exact, atol=1e-3)


def test_norm_weighs_examples_as_if_repeated(x64):
    norm, values = BatchStatisticsNorm(2, param_dtype=jnp.float64), draw(0, 3, 4, 2)
    weighted = norm(values, jnp.array([2.0, 0.0, 1.0]))
    repeated = norm(values[jnp.array([0, 0, 2])])
    np.testing.assert_allclose(weighted[0], repeated[0], rtol=1e-12)
    np.testing.assert_allclose(weighted[2], repeated[2], rtol=1e-12)


def test_norm_computes_in_float32_at_least():
    values = draw(0, 500, 3).astype(jnp.bfloat16)
    normed = BatchStatisticsNorm(3, param_dtype=jnp.bfloat16)(values)
    assert normed.dtype == jnp.bfloat16
    exact = BatchStatisticsNorm(3)(values.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(normed, exact)


@pytest.mark.parametrize("weights", [{}, {"weights": jnp.array([1.0, 0.0, 2.0, 1.0])}])
def test_constant_inputs_have_finite_first_and_second_derivatives(weights):
    apply_fn, params, _ = nn.from_nnx(nn.MLP(3, 2, norm=True, rngs=nnx.Rngs(0)))
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
    "mlp-norm": lambda dtype: nn.MLP(680, 5, norm=True, param_dtype=dtype, rngs=nnx.Rngs(0)),
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
    if "norm" in name or "conv" in name:
        assert not np.allclose(apply(inputs)[0], outputs[0], atol=1e-6)


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
