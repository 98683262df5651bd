"""A state comes back as it was saved, or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmaml import checkpoint
from jaxmaml.types import MetaState


def _state(width=3):
    params = {"conv": {"0": {"kernel": jnp.arange(2.0 * width).reshape(2, width)}}}
    optimizer = optax.adam(1e-3)
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    return MetaState(params, opt_state, jnp.asarray(7), {"mean": jnp.ones(2)})


def test_round_trip(tmp_path):
    state = _state()
    checkpoint.save(tmp_path / "exact@0.4", state)
    restored = checkpoint.restore(tmp_path / "exact@0.4", jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_another_model_is_refused(tmp_path):
    checkpoint.save(tmp_path / "exact", _state())
    with pytest.raises(ValueError, match=r"another model: .*conv\.0\.kernel"):
        checkpoint.restore(tmp_path / "exact", _state(width=4))


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*nowhere"):
        checkpoint.restore(tmp_path / "nowhere", _state())


def test_never_over_another(tmp_path):
    checkpoint.save(tmp_path / "exact", _state())
    with pytest.raises(ValueError, match="exists already"):
        checkpoint.save(tmp_path / "exact", _state())
