"""One comparison of pytrees for all tests."""

from typing import Any

import jax
import numpy as np


def flat(tree: Any) -> np.ndarray:
    """Returns all numbers of a pytree in one float64 vector."""
    leaves = [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def assert_close(found: Any, expected: Any, relative: float = 1e-6) -> None:
    """Asserts ||found - expected|| <= relative * ||expected||, over trees of the same structure."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    found, expected = flat(found), flat(expected)
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= relative * np.linalg.norm(expected)


def assert_equal(found: Any, expected: Any) -> None:
    """Asserts that trees of the same structure are equal, bit for bit, NaN included."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_leaves_close(found: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Asserts that every number of a pytree is close, for tests in which small leaves matter."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected
    )
