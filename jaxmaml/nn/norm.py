"""Normalization as a policy: the statistics with which an example is normalized.

| policy | in training mode | in evaluation mode (`module.eval()`) |
|---|---|---|
| transductive | those of the current batch | the same: no state, the mode has no effect |
| inductive | those of the current batch, which are stored | the stored ones |
| running | those of the current batch, which update an average | the average |
| per_step | as running, with one average per inner step | the average of that step |
| layer, group | those of the example itself, over all channels or groups of them | the same |
| none | nothing is normalized | the same |

The derivative passes through the statistics of the current batch. TensorFlow's `tf.nn.moments` stops
the gradient of the mean within the variance, which leaves first derivatives right and second ones
wrong: with it, the second-order meta-gradient of the MAML authors' code is not that of its loss.

Stored statistics are the state of a model (`nnx.BatchStat`), which the inner loop carries from the
support to the query. To normalize the query with the statistics of the support:

    model = nn.from_nnx_with_state(module)
    learner = jaxmaml.maml(
        nn.cross_entropy(model.train_fn), optimizer, num_inner_steps,
        query_loss_fn=nn.cross_entropy(model.test_fn), refresh_state=True,
    )
    meta_state = jaxmaml.init_state(learner, outer_optimizer, model.params, model.state)

`refresh_state` computes the statistics once more, with the adapted parameters, and differentiates
through them. Without it they are those of the last inner step, computed with the parameters before
that step, and are constants like all state.
"""

import math
from types import EllipsisType
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxmaml.checks import check_choice, check_count
from jaxmaml.nn.layers import as_row
from jaxmaml.nn.normalizer import Normalizer, from_statistics
from jaxmaml.types import Array

POLICIES = ("transductive", "inductive", "running", "per_step", "layer", "group", "none")
"""The policies that `make_norm` takes."""


class _Normalization(nnx.Module):
    """A linear function of each number of its inputs."""

    def __call__(self, inputs: Array, weights: Array | None = None) -> Array:
        """Normalizes `[num_examples, ..., num_channels]`; weights are those of the examples."""
        return self.normalizer(inputs, weights)(inputs)

    def normalizer(self, inputs: Array, weights: Array | None = None) -> Normalizer:
        """Returns the function that normalizes the inputs, with their statistics.

        It takes the inputs or a part of them, with the same number of axes, examples and channels.
        """
        raise NotImplementedError


class _Learned(_Normalization):
    """An offset and, with `scale`, a scale."""

    def __init__(self, shape: tuple[int, ...], scale: bool, param_dtype: Any):
        self.offset = nnx.Param(jnp.zeros(shape, param_dtype))
        if scale:
            self.scale = nnx.Param(jnp.ones(shape, param_dtype))
        self.has_scale = scale


class BatchStatisticsNorm(_Learned):
    """Normalizes each channel by its mean and variance over the batch (and space).

    Args:
        num_channels: the size of the last axis.
        scale: whether to learn a scale beside the offset.
        param_dtype: the dtype of the parameters.
    """

    def __init__(self, num_channels: int, *, scale: bool = True, param_dtype: Any = jnp.float32):
        super().__init__((num_channels,), scale, param_dtype)

    def normalizer(self, inputs: Array, weights: Array | None = None) -> Normalizer:
        """Returns the function that normalizes the inputs, with their statistics."""
        offset, scale = self._affine()
        dtype = jnp.result_type(inputs, offset)
        values = inputs.astype(jnp.promote_types(dtype, jnp.float32))
        mean, variance = self._statistics(values, weights)
        offset = as_row(offset, values.ndim)
        scale = None if scale is None else as_row(scale, values.ndim)
        return from_statistics(mean, variance, offset, scale, dtype)

    def _affine(self) -> tuple[Array, Array | None]:
        return self.offset[...], self.scale[...] if self.has_scale else None

    def _statistics(self, values: Array, weights: Array | None) -> tuple[Array, Array]:
        # The mean of the squared deviations: E[x²] - E[x]² would cancel where the mean is large.
        mean = _batch_mean(values, weights)
        return mean, _batch_mean((values - mean) ** 2, weights)


class StoredStatisticsNorm(BatchStatisticsNorm):
    """Stores the statistics of batches in training mode, for use in evaluation mode.

    Args:
        num_channels: the size of the last axis.
        momentum: the weight of the stored value at each update; 0 stores the last batch's
            statistics.
        num_rows: the number of sets of statistics, None for one.
        scale: whether to learn a scale beside the offset.
        param_dtype: the dtype of the parameters; statistics are float32 or higher.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        momentum: float,
        num_rows: int | None = None,
        scale: bool = True,
        param_dtype: Any = jnp.float32,
    ):
        super().__init__(num_channels, scale=scale, param_dtype=param_dtype)
        shape = (num_channels,) if num_rows is None else (num_rows, num_channels)
        dtype = jnp.promote_types(param_dtype, jnp.float32)
        self.mean = nnx.BatchStat(jnp.zeros(shape, dtype))
        self.var = nnx.BatchStat(jnp.ones(shape, dtype))
        self.momentum = momentum
        self.use_running_average = False  # the name that `module.eval()` looks for

    def _row(self) -> Array | EllipsisType:
        """Returns the index into `mean` and `var` of the statistics of this call."""
        return ...

    def _statistics(self, values: Array, weights: Array | None) -> tuple[Array, Array]:
        if self.use_running_average:
            return self._load(self.mean, values), self._load(self.var, values)
        mean, variance = super()._statistics(values, weights)
        self._store(self.mean, mean)
        self._store(self.var, variance)
        return mean, variance

    def _load(self, variable: nnx.Variable[Array], values: Array) -> Array:
        return as_row(variable[...][self._row()].astype(values.dtype), values.ndim)

    def _store(self, variable: nnx.Variable[Array], new: Array) -> None:
        stored, row = variable[...], self._row()
        new = new.reshape(-1).astype(stored.dtype)  # a scan needs the dtype to stay the same
        if self.momentum:
            new = self.momentum * stored[row] + (1 - self.momentum) * new
        variable[...] = stored.at[row].set(new)


class PerStepNorm(StoredStatisticsNorm):
    """The normalization of MAML++: statistics, offset and scale per inner step.

    Antoniou, Edwards and Storkey 2019 (arXiv 1810.09502), section 4 (BNRS and BNWB). The state
    `inner_step`, int32, counts the calls and selects row min(inner_step, num_steps). Every learner
    with an inner loop sets it to 0 at the start of a task: inner step i uses row i, and the query
    after n steps row n. The code of the paper never leaves training mode.

    Args:
        num_channels: the size of the last axis.
        num_steps: the number of inner steps; there is one more row, for the query.
        momentum: the weight of the stored average at each update.
        per_step_weights: whether offset and scale are `[num_steps + 1, num_channels]`, too.
        scale: whether to learn a scale beside the offset.
        param_dtype: the dtype of the parameters; statistics are float32 or higher.
    """

    def __init__(
        self,
        num_channels: int,
        num_steps: int,
        *,
        momentum: float,
        per_step_weights: bool = True,
        scale: bool = True,
        param_dtype: Any = jnp.float32,
    ):
        super().__init__(
            num_channels,
            momentum=momentum,
            num_rows=num_steps + 1,
            scale=scale,
            param_dtype=param_dtype,
        )
        if per_step_weights:
            _Learned.__init__(self, (num_steps + 1, num_channels), scale, param_dtype)
        self.inner_step = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.num_steps = num_steps
        self.per_step_weights = per_step_weights

    def normalizer(self, inputs: Array, weights: Array | None = None) -> Normalizer:
        """Returns the function that normalizes the inputs with the row of this step."""
        normalize = super().normalizer(inputs, weights)
        self.inner_step[...] = self.inner_step[...] + 1
        return normalize

    def _row(self) -> Array | EllipsisType:
        return jnp.minimum(self.inner_step[...], self.num_steps)

    def _affine(self) -> tuple[Array, Array | None]:
        offset, scale = super()._affine()
        row = self._row() if self.per_step_weights else ...
        return offset[row], None if scale is None else scale[row]


# Not nnx.GroupNorm, whose offset is called bias: a mask by name would depend on the policy.
class GroupNorm(_Learned):
    """Normalizes each group of channels of an example by its mean and variance over space.

    Wu and He 2018 (arXiv 1803.08494). With one group this is layer normalization.

    Args:
        num_channels: the size of the last axis.
        num_groups: a divisor of num_channels.
        scale: whether to learn a scale beside the offset.
        param_dtype: the dtype of the parameters.
    """

    def __init__(
        self,
        num_channels: int,
        num_groups: int,
        *,
        scale: bool = True,
        param_dtype: Any = jnp.float32,
    ):
        super().__init__((num_channels,), scale, param_dtype)
        self.num_groups = num_groups

    def normalizer(self, inputs: Array, weights: Array | None = None) -> Normalizer:
        """Returns the function that normalizes the inputs; the weights have no effect."""
        del weights
        offset = self.offset[...]
        dtype = jnp.result_type(inputs, offset)
        values = inputs.astype(jnp.promote_types(dtype, jnp.float32))
        grouped = values.reshape(values.shape[0], -1, self.num_groups, self._group_size(inputs))
        mean = grouped.mean(axis=(1, 3), keepdims=True)
        variance = ((grouped - mean) ** 2).mean(axis=(1, 3), keepdims=True)
        per_channel = lambda statistic: self._per_channel(statistic, inputs.ndim)
        offset = as_row(offset, inputs.ndim)
        scale = as_row(self.scale[...], inputs.ndim) if self.has_scale else None
        return from_statistics(per_channel(mean), per_channel(variance), offset, scale, dtype)

    def _per_channel(self, statistic: Array, ndim: int) -> Array:
        """Returns a number per example and group as one per example and channel."""
        repeated = statistic.repeat(self.offset.shape[0] // self.num_groups, axis=-1)
        return repeated.reshape((statistic.shape[0],) + (1,) * (ndim - 2) + (-1,))

    def _group_size(self, inputs: Array) -> int:
        num_values = math.prod(inputs.shape[1:]) // self.num_groups
        if num_values < 2:
            raise ValueError(
                f"a group of one number normalizes to zero: {inputs.shape[-1]} channels in "
                f"{self.num_groups} groups of inputs {inputs.shape}; choose another norm policy"
            )
        return inputs.shape[-1] // self.num_groups


class Identity(_Normalization):
    """No normalization, and no parameters."""

    def normalizer(self, inputs: Array, weights: Array | None = None) -> Normalizer:
        """Returns the identity."""
        del weights
        one, zero = jnp.ones((), inputs.dtype), jnp.zeros((), inputs.dtype)
        return Normalizer(one, zero, inputs.dtype)


Norm = BatchStatisticsNorm | GroupNorm | Identity


def make_norm(
    policy: str,
    num_channels: int,
    *,
    scale: bool = True,
    num_steps: int | None = None,
    per_step_weights: bool = True,
    momentum: float = 0.9,
    param_dtype: Any = jnp.float32,
) -> Norm:
    """Returns the normalization layer of a policy, called as `norm(inputs, weights=None)`.

    Inputs are `[num_examples, ..., num_channels]`. The weights `[num_examples]` are how much each
    example counts in the statistics of the batch.

    Paths of the parameters: `offset` and, with scale, `scale`, both `[num_channels]`. With
    policy="per_step" and per_step_weights they are `[num_steps + 1, num_channels]`. The policy
    "none" has no parameters.

    Args:
        policy: one of `POLICIES`, which the docstring of this module describes.
        num_channels: the size of the last axis. "group" divides it into as many groups of equal
            size as possible, at most 8.
        scale: whether to learn a scale beside the offset.
        num_steps: the number of inner steps, required by "per_step" and refused by other policies.
        per_step_weights: whether "per_step" learns an offset and a scale per step, too.
        momentum: the weight of the stored average at each update, for "running" and "per_step".
        param_dtype: the dtype of the parameters. Statistics are computed in float32 or higher.

    Returns:
        An NNX module.

    Raises:
        TypeError: num_channels or num_steps is not an integer.
        ValueError: policy is unknown, num_channels is less than 1, momentum is outside [0, 1), or
            num_steps is missing or negative with "per_step" or given with another policy.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import nn
        >>> norm = nn.make_norm("inductive", 1)
        >>> _ = norm(jnp.array([[0.0], [2.0]]))  # the support: mean 1, variance 1
        >>> norm.eval()
        >>> [round(float(x), 2) for x in norm(jnp.array([[1.0], [5.0]]))[:, 0]]  # the query
        [0.0, 4.0]
    """
    check_choice("norm", policy, POLICIES)
    check_count("num_channels", num_channels)
    num_steps = _check_num_steps(policy, num_steps)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and less than 1, got {momentum}")
    options: dict[str, Any] = {"scale": scale, "param_dtype": param_dtype}
    build = {
        "transductive": lambda: BatchStatisticsNorm(num_channels, **options),
        "inductive": lambda: StoredStatisticsNorm(num_channels, momentum=0.0, **options),
        "running": lambda: StoredStatisticsNorm(num_channels, momentum=momentum, **options),
        "per_step": lambda: PerStepNorm(
            num_channels,
            num_steps,
            momentum=momentum,
            per_step_weights=per_step_weights,
            **options,
        ),
        "layer": lambda: GroupNorm(num_channels, 1, **options),
        "group": lambda: GroupNorm(num_channels, _num_groups(num_channels), **options),
        "none": Identity,
    }
    return build[policy]()


def cancels_bias(policy: str, num_channels: int) -> bool:
    """Returns whether a bias before the normalization has no effect in training mode.

    It has none where each channel is normalized by its own mean: over the batch, or in a group of one
    channel.

    Args:
        policy: one of `POLICIES`.
        num_channels: as in `make_norm`.

    Example:
        >>> cancels_bias("transductive", 64), cancels_bias("group", 64), cancels_bias("group", 4)
        (True, False, True)
    """
    num_groups = {"layer": 1, "group": _num_groups(num_channels), "none": 0}
    return num_groups.get(policy, num_channels) == num_channels


def _check_num_steps(policy: str, num_steps: int | None) -> int:
    if policy != "per_step":
        if num_steps is not None:
            raise ValueError(f"num_steps is for norm='per_step' only; got norm={policy!r}")
        return 0
    if num_steps is None:
        raise ValueError("norm='per_step' needs num_steps, the number of inner steps; got None")
    return check_count("num_steps", num_steps, minimum=0)


def _num_groups(num_channels: int) -> int:
    return max(n for n in range(1, min(8, num_channels) + 1) if num_channels % n == 0)


def _batch_mean(values: Array, weights: Array | None) -> Array:
    """Returns the mean over all axes except the last, which are kept with size 1."""
    axes = tuple(range(values.ndim - 1))
    if weights is None:
        return values.mean(axis=axes, keepdims=True)
    means = values.mean(axis=axes[1:], keepdims=True)
    column = jnp.asarray(weights, values.dtype).reshape((-1,) + (1,) * (values.ndim - 1))
    return (column * means).sum(axis=0, keepdims=True) / column.sum()
