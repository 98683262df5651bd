"""The checks that all arguments share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmaml.checks import check_choice, check_count, zero_or_nan


@pytest.mark.parametrize(("value", "minimum"), [(1, 1), (np.int64(7), 1), (0, 0), (np.array(3), 2)])
def test_integers_of_any_type_are_returned_as_int(value, minimum):
    found = check_count("way", value, minimum=minimum)
    assert type(found) is int
    assert found == value


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ValueError), (-3, ValueError), (1.0, TypeError), ("5", TypeError), (True, TypeError)],
)
def test_what_is_not_a_count_is_refused(value, error):
    with pytest.raises(error, match="way must be an integer, 1 or more; got"):
        check_count("way", value)


def test_a_choice_is_one_of_its_values():
    check_choice("mode", "a", ("a", "b"))
    with pytest.raises(ValueError, match="mode must be one of a, b; got 'c'"):
        check_choice("mode", "c", ("a", "b"))


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_a_value_that_is_traced_and_wrong_gives_nan_even_beside_a_bool(transform):
    """XLA makes a selection of a product with a converted bool, in which NaN would be lost."""

    def count(values):
        zero = zero_or_nan(lambda x: x > 0, values, "values must be positive")
        return (values == 7).astype(jnp.float32) + zero

    np.testing.assert_array_equal(transform(count)(jnp.array([7, -1, 2])), [1, np.nan, 0])
    with pytest.raises(ValueError, match="values must be positive; got -1"):
        count(jnp.array([7, -1, 2]))
