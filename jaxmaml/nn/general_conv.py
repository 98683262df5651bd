"""Every convolution that `lax.conv_general_dilated` computes, as patches times a matrix.

The forms, by the shape of the convolution:

- `groups == 1`: patches `[rows, taps * channels]` times a matrix, as `nn.conv` computes it;
- one input channel per group (depthwise): a sum over the taps of shifted inputs times weights, since
  there is nothing to contract;
- other groups: one product per group;
- dilated inputs (transposed convolutions): one convolution without dilation per phase of the outputs,
  with the taps that meet an entry of the inputs, so that no zeros are multiplied.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmaml.nn.convolution import product
from jaxmaml.types import Array


class Window(NamedTuple):
    """The way of the kernel along one spatial axis.

    Attributes:
        size: the number of taps.
        stride: the step between neighboring outputs.
        low, high: entries added before and after the inputs; negative numbers crop.
        dilation: the step between neighboring taps.
        input_dilation: the step between neighboring inputs.
    """

    size: int
    stride: int
    low: int
    high: int
    dilation: int
    input_dilation: int

    def num_outputs(self, num_inputs: int) -> int:
        """Returns the length of the outputs for a length of the inputs."""
        dilated = max(0, (num_inputs - 1) * self.input_dilation + 1)
        span = (self.size - 1) * self.dilation + 1
        return max(0, (dilated + self.low + self.high - span) // self.stride + 1)


def conv_general(inputs: Array, kernel: Array, **params: Any) -> Array:
    """Returns `lax.conv_general_dilated` up to rounding, as patches times a matrix.

    Args:
        inputs, kernel: in the layout that `dimension_numbers` gives, of one dtype.
        params: the parameters of the primitive operation: window_strides, padding, lhs_dilation,
            rhs_dilation, dimension_numbers (a `ConvDimensionNumbers`), feature_group_count,
            batch_group_count, precision and preferred_element_type.

    Example:
        >>> import jax
        >>> def conv(form, inputs, kernel):
        ...     return form(inputs, kernel, window_strides=(2,), padding=((1, 1),))
        >>> x, k = jnp.arange(8.0).reshape(1, 1, 8), jnp.ones((1, 1, 3))
        >>> eqn = jax.make_jaxpr(functools.partial(conv, lax.conv_general_dilated))(x, k).eqns[-1]
        >>> conv_general(x, k, **eqn.params)[0, 0].tolist()
        [1.0, 6.0, 12.0, 18.0]
    """
    # Channels last: inputs [num, *space, channels], kernel [*taps, channels of a group, filters].
    specs = params["dimension_numbers"]
    batch_axis, channel_axis, *space = specs.lhs_spec
    images = inputs.transpose(batch_axis, *space, channel_axis)
    filter_axis, channel_axis, *space = specs.rhs_spec
    taps = kernel.transpose(*space, channel_axis, filter_axis)

    # The convolution of each group of examples.
    windows = windows_of(params, taps.shape[:-2])
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    run = functools.partial(
        _convolve, windows=windows, num_groups=params["feature_group_count"], options=options
    )
    num_groups = params["batch_group_count"]
    outputs = (
        run(images, taps) if num_groups == 1 else _in_batch_groups(run, images, taps, num_groups)
    )

    # The layout of the outputs.
    batch_axis, channel_axis, *space = specs.out_spec
    places = (batch_axis, *space, channel_axis)
    return outputs.transpose(sorted(range(outputs.ndim), key=places.__getitem__))


def windows_of(params: Any, sizes: Sequence[int]) -> tuple[Window, ...]:
    """Returns the windows of a convolution.

    Args:
        params: those of the primitive operation, as in `conv_general`.
        sizes: the numbers of taps along the spatial axes.
    """
    lows, highs = zip(*params["padding"], strict=True) if params["padding"] else ((), ())
    columns = (
        sizes, params["window_strides"], lows, highs, params["rhs_dilation"], params["lhs_dilation"]
    )  # fmt: skip
    return tuple(Window(*map(int, row)) for row in zip(*columns, strict=True))


def _in_batch_groups(run: Any, images: Array, taps: Array, num_groups: int) -> Array:
    """The convolution of each group of examples with its own group of filters."""
    images = images.reshape(num_groups, -1, *images.shape[1:])
    taps = taps.reshape(*taps.shape[:-1], num_groups, -1)
    outputs = jax.vmap(run, in_axes=(0, -2), out_axes=-2)(images, taps)
    return outputs.reshape(*outputs.shape[:-2], -1)


def _convolve(
    images: Array, taps: Array, windows: Sequence[Window], num_groups: int, options: dict[str, Any]
) -> Array:
    """The convolution of `[num, *space, channels]` with `[*taps, channels of a group, filters]`."""
    if any(window.input_dilation > 1 for window in windows):
        if all(window.stride == 1 for window in windows):
            return _phases(images, taps, windows, num_groups, options)
        images, windows = _dilated(images, windows)
    padding = [(0, 0, 0), *((window.low, window.high, 0) for window in windows), (0, 0, 0)]
    padded = lax.pad(images, jnp.zeros((), images.dtype), padding)
    lengths = zip(windows, images.shape[1:-1], strict=True)
    shape = [window.num_outputs(length) for window, length in lengths]
    parts = [_part(padded, place, windows, shape) for place in _places(windows)]
    if num_groups == 1:
        matrix = taps.reshape(-1, taps.shape[-1])
        patches = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
        outputs = product(patches.reshape(-1, matrix.shape[0]), matrix, **options)
    elif taps.shape[-2] == 1:
        outputs = _depthwise(parts, taps, num_groups, options)
    else:
        outputs = _grouped(parts, taps, num_groups, options)
    return outputs.reshape(images.shape[0], *shape, -1)


def _places(windows: Sequence[Window]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(window.size) for window in windows)))


def _part(
    padded: Array, place: Sequence[int], windows: Sequence[Window], shape: Sequence[int]
) -> Array:
    """The entries that one tap meets, `[num, *shape, channels]`."""
    rows = list(zip(place, windows, shape, strict=True))
    starts = [tap * window.dilation for tap, window, _ in rows]
    ends = [
        start + (length - 1) * window.stride + 1
        for start, (_, window, length) in zip(starts, rows, strict=True)
    ]
    num, channels = padded.shape[0], padded.shape[-1]
    strides = (1, *(window.stride for window in windows), 1)
    return lax.slice(padded, (0, *starts, 0), (num, *ends, channels), strides)


def _depthwise(
    parts: Sequence[Array], taps: Array, num_groups: int, options: dict[str, Any]
) -> Array:
    """A sum over the taps, in float32 at least, as a product would be."""
    dtype = options["preferred_element_type"] or taps.dtype
    is_float = jnp.issubdtype(dtype, jnp.floating)
    work = jnp.promote_types(dtype, jnp.float32) if is_float else dtype
    weights = taps.astype(work).reshape(len(parts), num_groups, -1)
    terms = [
        part.reshape(-1, num_groups, 1).astype(work) * weights[None, i]
        for i, part in enumerate(parts)
    ]
    return functools.reduce(jnp.add, terms).astype(dtype)


def _grouped(
    parts: Sequence[Array], taps: Array, num_groups: int, options: dict[str, Any]
) -> Array:
    """One product per group."""
    num_channels = taps.shape[-2]
    stacked = jnp.stack(
        [part.reshape(-1, num_groups, num_channels) for part in parts], axis=2
    )  # [rows, groups, taps, channels of a group]
    matrices = taps.reshape(len(parts), num_channels, num_groups, -1)
    numbers = (((2, 3), (0, 1)), ((1,), (2,)))
    outputs = lax.dot_general(stacked, matrices, numbers, **options)  # [groups, rows, filters]
    return outputs.transpose(1, 0, 2)


def _dilated(images: Array, windows: Sequence[Window]) -> tuple[Array, tuple[Window, ...]]:
    """The inputs with zeros between them, and the windows over these."""
    between = [(0, 0, window.input_dilation - 1) for window in windows]
    zero = jnp.zeros((), images.dtype)
    dilated = lax.pad(images, zero, [(0, 0, 0), *between, (0, 0, 0)])
    return dilated, tuple(window._replace(input_dilation=1) for window in windows)


class _Phase(NamedTuple):
    """The outputs of one remainder of their index, along one axis.

    Attributes:
        first, step: the taps that meet an input.
        window: the windows of these taps over the inputs without dilation.
    """

    first: int
    step: int
    window: Window


def _phase(window: Window, remainder: int, num_inputs: int, num_outputs: int) -> _Phase | None:
    """Returns the phase of the outputs `remainder + i * input_dilation`; None without taps.

    Output o meets through tap k the entry `o + k * dilation - low` of the dilated inputs, which is an
    input if `input_dilation` divides it.
    """
    ratio = window.input_dilation
    step = ratio // math.gcd(ratio, window.dilation)
    offset = lambda tap: remainder + tap * window.dilation - window.low
    first = next((k for k in range(min(step, window.size)) if offset(k) % ratio == 0), None)
    if first is None:
        return None
    size = len(range(first, window.size, step))
    dilation = window.dilation * step // ratio
    low = -(offset(first) // ratio)
    # As many entries as the outputs of this phase need.
    span = (num_outputs - 1) + (size - 1) * dilation + 1
    return _Phase(first, step, Window(size, 1, low, span - num_inputs - low, dilation, 1))


def _phases(
    images: Array, taps: Array, windows: Sequence[Window], num_groups: int, options: dict[str, Any]
) -> Array:
    """A convolution of dilated inputs as one convolution per phase of the outputs."""
    lengths = images.shape[1:-1]
    shape = [w.num_outputs(length) for w, length in zip(windows, lengths, strict=True)]
    ratios = [window.input_dilation for window in windows]
    counts = [-(-length // ratio) for length, ratio in zip(shape, ratios, strict=True)]
    dtype = options["preferred_element_type"] or images.dtype
    blank = jnp.zeros((images.shape[0], *counts, taps.shape[-1]), dtype)

    def outputs_of(remainders: tuple[int, ...]) -> Array:
        rows = zip(windows, remainders, lengths, counts, strict=True)
        phases = [_phase(*row) for row in rows]
        if any(phase is None for phase in phases):
            return blank
        chosen = tuple(slice(phase.first, None, phase.step) for phase in phases if phase)
        inner = [phase.window for phase in phases if phase]
        return _convolve(images, taps[chosen], inner, num_groups, options)

    # [phases of axis 1, ..., num, *counts, filters] to [num, count 1, phases 1, ..., filters].
    every = [outputs_of(place) for place in itertools.product(*map(range, ratios))]
    stacked = jnp.stack(every).reshape(*ratios, *blank.shape)
    ndim = len(windows)
    pairs = [axis for i in range(ndim) for axis in (ndim + 1 + i, i)]
    joined = stacked.transpose(ndim, *pairs, stacked.ndim - 1)
    whole = [count * ratio for count, ratio in zip(counts, ratios, strict=True)]
    joined = joined.reshape(images.shape[0], *whole, -1)
    return lax.slice(joined, (0,) * joined.ndim, (images.shape[0], *shape, joined.shape[-1]))
