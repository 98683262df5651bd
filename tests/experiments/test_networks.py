"""The network of a preset: its functions, its state and its dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiny import IMAGE_SHAPE, PRESET, REGRESSION
from jaxmaml.experiments import networks, presets


def _batch(way=3, num_examples=6):
    inputs = jax.random.normal(jax.random.key(1), (num_examples, *IMAGE_SHAPE))
    return {"inputs": inputs, "targets": jnp.arange(num_examples) % way}


def _build(preset=PRESET, **options):
    return networks.build(preset, IMAGE_SHAPE, jax.random.key(0), **options)


@pytest.mark.parametrize("norm", ["layer", "group", "none"])
def test_a_normalization_of_single_examples_has_no_state(norm):
    network = _build(presets.override(PRESET, norm=norm, hidden_sizes=(12,)))
    assert network.state == ()
    whole = network.model.apply_fn(network.params, _batch())
    alone = {name: leaf[:1] for name, leaf in _batch().items()}
    np.testing.assert_allclose(
        network.model.apply_fn(network.params, alone), whole[:1], rtol=1e-5, atol=1e-6
    )


def test_batch_statistics_depend_on_the_batch():
    network = _build()
    whole = network.model.apply_fn(network.params, _batch())
    half = {name: leaf[:3] for name, leaf in _batch().items()}
    assert not np.allclose(network.model.apply_fn(network.params, half), whole[:3], rtol=1e-3)


def test_a_residual_network_is_a_model_too():
    preset = presets.override(PRESET, model="resnet12", num_filters=1, adapt_norm=False)
    network = networks.build(preset, (16, 16, 1), jax.random.key(0))
    batch = {"inputs": jax.ShapeDtypeStruct((6, 16, 16, 1), jnp.float32)}
    assert jax.eval_shape(network.model.apply_fn, network.params, batch).shape == (6, 3)
    assert network.params["block"][3]["conv"][0]["kernel"].shape == (3, 3, 4, 8)


def test_a_head_serves_fewer_classes():
    whole, served = _build(), _build(served_way=2)
    logits = whole.model.apply_fn(whole.params, _batch(way=2))
    np.testing.assert_array_equal(
        served.model.apply_fn(served.params, _batch(way=2)), logits[:, :2]
    )
    with pytest.raises(ValueError, match="served_way must be at most way=3; got 4"):
        _build(served_way=4)


def test_the_metric_is_accuracy_or_the_mean_squared_error():
    network = _build()
    params = jax.tree.map(jnp.zeros_like, network.params)
    params["head"]["bias"] = jnp.array([0.0, 1.0, 0.0])
    assert network.model.metric_fn(params, _batch()) == pytest.approx(1 / 3)
    regression = networks.build(REGRESSION, (1,), jax.random.key(0))
    zero = jax.tree.map(jnp.zeros_like, regression.params)
    batch = {"inputs": jnp.ones((2, 1)), "targets": jnp.array([[1.0], [3.0]])}
    assert regression.model.metric_fn(zero, batch) == pytest.approx(5.0)


def test_a_context_scales_and_shifts_the_features():
    network = _build()
    params = networks.add_context(network.params, jax.random.key(0))
    outputs = network.model.apply_fn(network.params, _batch())
    np.testing.assert_array_equal(network.model.apply_fn(params, _batch()), outputs)
    shifted = {**params, "context": jnp.ones(networks.NUM_CONTEXT)}
    assert not np.allclose(network.model.apply_fn(shifted, _batch()), outputs)


def test_the_compute_dtype_rounds_the_outputs_and_keeps_the_parameters():
    exact, rounded = _build(), _build(presets.override(PRESET, compute_dtype="bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded.params))
    outputs = rounded.model.apply_fn(rounded.params, _batch())
    reference = exact.model.apply_fn(exact.params, _batch())
    assert outputs.dtype == jnp.float32
    assert not np.array_equal(outputs, reference)
    np.testing.assert_allclose(outputs, reference, atol=0.05)
