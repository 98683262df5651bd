import jax.numpy as jnp
import numpy as np
import pytest
from cases import draw
from flax import nnx

from jaxmaml import nn
from jaxmaml.nn.layers import Conv, HeadedNetwork, check_image_shape


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_convolution_layer_is_nn_conv_with_its_bias(use_bias):
    options = {"size": 2, "stride": 2, "param_dtype": jnp.float32}
    layer = Conv(3, 4, use_bias=use_bias, rngs=nnx.Rngs(0), **options)
    inputs = draw(0, 2, 6, 6, 3).astype(jnp.float32)
    outputs = nn.conv(inputs, layer.kernel[...], stride=2)
    assert layer.kernel.shape == (2, 2, 3, 4)
    np.testing.assert_array_equal(layer(inputs), outputs)
    assert hasattr(layer, "bias") == use_bias
    if use_bias:
        layer.bias[...] = jnp.arange(4.0)
        np.testing.assert_array_equal(layer(inputs), outputs + jnp.arange(4.0))


@pytest.mark.parametrize("model", [nn.Conv4, nn.MLP, nn.ResNet12])
def test_the_call_of_every_network_is_the_one_of_the_base_class(model):
    assert model.__call__ is HeadedNetwork.__call__


def test_a_call_is_the_head_of_the_features():
    network = nn.MLP(6, 5, norm="transductive", rngs=nnx.Rngs(0))
    inputs, weights = draw(0, 4, 6).astype(jnp.float32), jnp.arange(4.0)
    for given in ((inputs,), (inputs, weights)):
        expected = network.head(network.features(*given))
        np.testing.assert_array_equal(network(*given), expected)


@pytest.mark.parametrize("shape", [(8, 8), (8, 7, 1), (8, 8, 0)])
def test_an_image_shape_that_does_not_fit_is_refused(shape):
    assert check_image_shape([8, 8, 1], smallest=8) == (8, 8, 1)
    with pytest.raises(ValueError, match=r"image_shape must be .* at least 8"):
        check_image_shape(shape, smallest=8)
