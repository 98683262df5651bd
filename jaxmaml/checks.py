"""Checks of arguments that many functions share."""

import difflib
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jaxmaml.types import Array


def check_count(name: str, value: Any, *, minimum: int = 1) -> int:
    """Returns `value` as an int.

    Args:
        name: the name of the argument, for the message.
        value: an integer of any type with `__index__`, NumPy's included; not a bool.
        minimum: the smallest value that is allowed.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: `value` is less than `minimum`.

    Example:
        >>> check_count("way", 5)
        5
    """
    rule = f"{name} must be an integer, {minimum} or more; got {value!r}"
    if isinstance(value, bool):
        raise TypeError(rule)
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(rule) from None
    if number < minimum:
        raise ValueError(rule)
    return number


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `choices`.

    Args:
        name: the name of the argument, for the message.
        value: what was given.
        choices: what is allowed.

    Example:
        >>> check_choice("mode", "reverse", ("forward", "reverse"))
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError unless a name is one of those that are known; suggests one that is near.

    Args:
        kind: what is named, for the message.
        name: what was given.
        known: every name.

    Example:
        >>> check_known("learner", "MAML", ["maml", "anil"])
        Traceback (most recent call last):
        ValueError: unknown learner 'MAML': did you mean 'maml'? Known are maml, anil
    """
    known = list(known)
    if name in known:
        return
    near = nearest(name.lower(), known)
    hint = f" did you mean {near!r}?" if near else ""
    raise ValueError(f"unknown {kind} {name!r}:{hint} Known are {', '.join(known)}")


def nearest(name: str, known: Sequence[str], *, likeness: float = 0.6) -> str | None:
    """Returns the known name that is spelled most like another; None if none is like it.

    Args:
        name: what was given.
        known: every name.
        likeness: the least ratio of `difflib.SequenceMatcher`, from 0 to 1.

    Example:
        >>> nearest("mmal", ["maml", "anil"])
        'maml'
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=likeness)
    return near[0] if near else None


def zero_or_nan(
    is_right: Callable[[Any], Any], values: Array, rule: str, dtype: DTypeLike = jnp.float32
) -> Array:
    """Returns 0 where values are right and NaN elsewhere, if nobody can know yet which they are.

    It is added to what a result is computed from, so that under `jit`, `grad` or `vmap`, where values
    cannot be looked at, a wrong value makes the result NaN and never a wrong number. Added to the
    outputs of a model, it makes the gradient NaN too. A factor of NaN would not do: XLA turns a product
    with a converted bool into a selection.

    Args:
        is_right: `(values) -> bools` of the same shape, for NumPy and JAX arrays.
        values: an array. Traced or not.
        rule: what the values must be, for the message.
        dtype: the dtype of the result.

    Returns:
        An array of the shape of the values.

    Raises:
        ValueError: the values are not traced, and one of them is wrong.

    Example:
        >>> zero_or_nan(lambda x: x >= 0, jnp.array([1, 2]), "counts must be 0 or more")
        Array([0., 0.], dtype=float32)
        >>> import jax
        >>> check = lambda counts: zero_or_nan(lambda x: x >= 0, counts, "counts must be 0 or more")
        >>> jax.jit(check)(jnp.array([1, -2])).tolist()
        [0.0, nan]
    """
    if isinstance(values, Tracer):
        return jnp.where(is_right(values), jnp.zeros((), dtype), jnp.nan)
    known = np.asarray(values)
    wrong = known[~np.asarray(is_right(known))]
    if wrong.size:
        raise ValueError(f"{rule}; got {wrong[0]}")
    return jnp.zeros(known.shape, dtype)


def check_floating(name: str, values: Array) -> None:
    """Raises TypeError unless an array is floating-point."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating-point, got {values.dtype}")


def check_integer_classes(targets: Array, name: str = "targets") -> None:
    """Raises TypeError unless an array is of integers."""
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"{name} must be integer class labels, got {targets.dtype}")


def check_class_shapes(logits: Array, targets: Array) -> None:
    """Raises unless targets are integers `[num_examples, ...]` for logits `[num_examples, ..., way]`.

    Example:
        >>> check_class_shapes(jnp.zeros((5, 3)), jnp.zeros(5, int))
    """
    check_integer_classes(targets)
    if targets.ndim == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must be [num_examples] for logits [num_examples, way], got shapes "
            f"{targets.shape} and {logits.shape}"
        )


def zero_where_class(targets: Array, way: int, dtype: Any, name: str = "targets") -> Array:
    """Returns 0 where targets are in 0..way-1, and NaN elsewhere; see `zero_or_nan`."""
    largest = min(way - 1, int(jnp.iinfo(targets.dtype).max))
    is_class = lambda targets: (targets >= 0) & (targets <= largest)
    return zero_or_nan(is_class, targets, f"{name} must be classes in 0..{way - 1}", dtype)


def is_weight(values: Any) -> Any:
    """Returns whether each value is 0 or more and finite, False for NaN."""
    return (values >= 0) & (values < np.inf)


def checked_weights(weights: Any, num_examples: int, dtype: Any) -> tuple[Array, Array]:
    """Returns the weights of examples in a dtype, and 0 or, if they are traced and wrong, NaN.

    Raises:
        TypeError: the weights are not real numbers.
        ValueError: they are not `[num_examples]`; one is negative or not finite, and not traced.

    Example:
        >>> checked_weights([1, 0], 2, jnp.float32)[0].tolist()
        [1.0, 0.0]
    """
    weights = jnp.asarray(weights)
    if weights.shape != (num_examples,):
        raise ValueError(
            f"weights must be [num_examples] = [{num_examples}], got shape {weights.shape}"
        )
    check_real("weights", weights)
    zero = zero_or_nan(is_weight, weights, "weights must be 0 or more and finite", dtype)
    return weights.astype(dtype), zero.sum()


def check_real(name: str, values: Array) -> None:
    """Raises TypeError unless an array holds real numbers or bools."""
    real = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(values.dtype, kind) for kind in real):
        raise TypeError(f"{name} must be real numbers, got {values.dtype}")
