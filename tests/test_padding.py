import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmaml.padding import blank_padding


def test_examples_of_weight_zero_are_zeros_in_every_leaf():
    tree = {"inputs": jnp.full((3, 2), jnp.nan), "targets": jnp.array([4, 5, 6])}
    blank = blank_padding(tree, jnp.array([0.0, 0.5, 0.0]))
    np.testing.assert_array_equal(blank["inputs"], [[0, 0], [jnp.nan, jnp.nan], [0, 0]])
    np.testing.assert_array_equal(blank["targets"], [0, 5, 0])
    assert jax.tree.map(jnp.result_type, blank) == jax.tree.map(jnp.result_type, tree)


def test_no_gradient_reaches_padding():
    loss = lambda x: (blank_padding(x, jnp.array([1.0, 0.0])) ** 2).sum()
    np.testing.assert_array_equal(jax.grad(loss)(jnp.array([3.0, jnp.nan])), [6, 0])


@pytest.mark.parametrize("shape", [(2,), (3, 1), ()])
def test_weights_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"weights must be \[num_examples\]"):
        blank_padding(jnp.ones((3, 2)), jnp.ones(shape))
