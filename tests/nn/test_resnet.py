import jax.numpy as jnp
import pytest
from cases import (
    assert_adjoints_agree,
    assert_network_is,
    classified,
    jitter,
    plain_conv,
    plain_norm,
    plain_pool,
    small_resnet12,
)
from flax import nnx

from jaxmaml import nn, trees
from jaxmaml.nn.norm import POLICIES


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


def test_resnet12_is_the_network_in_plain_jax(x64):
    assert_network_is(small_resnet12(jnp.float64), plain_resnet12)


def test_parameter_paths():
    _, params = nn.from_nnx(small_resnet12(jnp.float32))
    layers = [f"conv/{i}/kernel" for i in range(3)] + ["shortcut/kernel"]
    norms = [*(f"norm/{i}" for i in range(3)), "shortcut_norm"]
    layers += [f"{norm}/{leaf}" for norm in norms for leaf in ("offset", "scale")]
    expected = {f"block/{i}/{layer}" for i in range(2) for layer in layers}
    assert set(trees.leaf_paths(params)) == expected | {"head/kernel", "head/bias"}


@pytest.mark.parametrize("policy", POLICIES)
def test_normalization_decides_whether_there_are_biases(policy):
    options = {"num_steps": 2} if policy == "per_step" else {}
    model = nn.from_nnx_with_state(
        small_resnet12(jnp.float32, norm=policy, num_filters=(3, 10), **options)
    )
    names = trees.leaf_paths(model.params)
    assert ("block/0/shortcut/bias" in names) == (policy in ("layer", "none"))
    # Ten channels are five groups of two, three are three of one.
    assert ("block/1/shortcut/bias" in names) == (policy in ("layer", "group", "none"))


@pytest.mark.slow
def test_resnet12_meta_gradient_is_the_same_in_both_exact_modes(x64):
    module = nn.ResNet12(
        3, image_shape=(4, 4, 1), num_filters=(2,), param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    apply_fn, params = nn.from_nnx(module)
    assert_adjoints_agree(nn.cross_entropy(apply_fn), jitter(params), classified(4, 4, 1))


@pytest.mark.parametrize(
    ("build", "error", "named"),
    [
        (lambda: nn.ResNet12(5, num_filters=(), rngs=nnx.Rngs(0)), ValueError, "num_filters"),
        (lambda: nn.ResNet12(5, num_filters=(4, 0), rngs=nnx.Rngs(0)), ValueError, "num_filters"),
        (lambda: nn.ResNet12(5, num_filters=(4.0,), rngs=nnx.Rngs(0)), TypeError, "num_filters"),  # type: ignore[arg-type]
        (
            lambda: nn.ResNet12(5, image_shape=(28, 15, 1), rngs=nnx.Rngs(0)),
            ValueError,
            "at least 16",
        ),
        (lambda: small_resnet12(jnp.float32)(jnp.ones((2, 28, 28, 3))), ValueError, "inputs"),
    ],
)
def test_resnet12_names_what_is_wrong(build, error, named):
    with pytest.raises(error, match=named):
        build()
