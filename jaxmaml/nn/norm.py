"""Normalisation as a policy: whose statistics an example is normalised with.

| policy | in training mode | in evaluation mode (`module.eval()`) |
|---|---|---|
| transductive | those of the batch at hand | the same: no state, the mode changes nothing |
| inductive | those of the batch at hand, which are stored | the ones stored |
| running | those of the batch at hand, which move an average | the average |
| per_step | as running, with an average for each inner step | that step's average |
| layer, group | the example's own, over all channels or groups of them | the same |
| none | nothing is normalised | the same |

Stored statistics are the state of a model (`nnx.BatchStat`), which the inner loop carries from the
support to the query. A query scored by what the support alone says is therefore

    train_fn, params, state = nn.from_nnx(model)
    model.eval()
    test_fn, _, _ = nn.from_nnx(model)
    learner = jaxmaml.maml(
        nn.cross_entropy(train_fn, has_state=True), optimizer, num_inner_steps, has_state=True,
        outer_loss_fn=nn.cross_entropy(test_fn, has_state=True), refresh_state=True,
    )

where `refresh_state` takes the statistics once more, with the adapted parameters, and differentiates
through them. Without it they are those of the last inner step, by the parameters before it, and
constants like all state.
"""

import math
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmaml.nn.layers import as_row, check_positive
from jaxmaml.types import Array

POLICIES = ("transductive", "inductive", "running", "per_step", "layer", "group", "none")
"""What `make_norm` takes."""

NORM_EPS = 1e-3
"""Added to the variance; the default of the MAML paper's code (tf.contrib.layers.batch_norm)."""


class _Learned(nnx.Module):
    """An offset and, if wanted, a scale."""

    def __init__(self, shape: tuple[int, ...], scale: bool, param_dtype: Any):
        self.offset = nnx.Param(jnp.zeros(shape, param_dtype))
        if scale:
            self.scale = nnx.Param(jnp.ones(shape, param_dtype))
        self.has_scale = scale


class BatchStatisticsNorm(_Learned):
    """Normalises each channel by its mean and variance over the examples (and space) at hand.

    Args:
        num_channels: size of the last axis.
        scale: whether to learn a scale beside the offset.
        param_dtype: type of the parameters.
    """

    def __init__(self, num_channels: int, *, scale: bool = True, param_dtype: Any = jnp.float32):
        super().__init__((num_channels,), scale, param_dtype)

    def __call__(self, inputs: Array, weights: Array | None = None) -> Array:
        """Normalises `[num_examples, ..., num_channels]`, examples counting by their weights."""
        offset, scale = self._affine()
        dtype = jnp.result_type(inputs, offset)
        values = inputs.astype(jnp.promote_types(dtype, jnp.float32))
        mean, variance = self._statistics(values, weights)
        offset = as_row(offset, values.ndim)
        scale = None if scale is None else as_row(scale, values.ndim)
        return _line(values, mean, variance, offset, scale).astype(dtype)

    def _affine(self) -> tuple[Array, Array | None]:
        return self.offset[...], self.scale[...] if self.has_scale else None

    def _statistics(self, values: Array, weights: Array | None) -> tuple[Array, Array]:
        # The variance of the deviations: E[x²] - E[x]² would cancel where the mean is large.
        mean = _batch_mean(values, weights)
        return mean, _batch_mean((values - mean) ** 2, weights)


class StoredStatisticsNorm(BatchStatisticsNorm):
    """Stores the statistics of the batches it is trained on, for use in evaluation mode.

    Args:
        num_channels: size of the last axis.
        momentum: the share of what is stored that stays at each batch; 0 stores the last batch's.
        num_rows: how many sets of statistics to keep, None for one.
        scale: whether to learn a scale beside the offset.
        param_dtype: type of the parameters; statistics are float32 at least.
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
        """Where in `mean` and `var` the statistics of this call are."""
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
        new = new.reshape(-1).astype(stored.dtype)  # the type must stay as it is along a scan
        if self.momentum:
            new = self.momentum * stored[row] + (1 - self.momentum) * new
        variable[...] = stored.at[row].set(new)


class PerStepNorm(StoredStatisticsNorm):
    """MAML++'s normalisation: statistics, offset and scale of their own at each inner step.

    Antoniou, Edwards and Storkey 2019 (arXiv 1810.09502), section 4 (BNRS and
    BNWB). A state `step`, int32, counts the calls and selects row
    min(step, num_steps): set to 0 at the start of a task, inner step i uses row i, and the query
    after n steps row n. The paper's own code never leaves training mode.

    Args:
        num_channels: size of the last axis.
        num_steps: inner steps, after the last of which there is one more row, for the query.
        momentum: the share of an average that stays at each batch.
        per_step_weights: whether offset and scale are `[num_steps + 1, num_channels]` too.
        scale: whether to learn a scale beside the offset.
        param_dtype: type of the parameters; statistics are float32 at least.
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
        self.step = nnx.BatchStat(jnp.zeros((), jnp.int32))
        self.num_steps = num_steps
        self.per_step_weights = per_step_weights

    def __call__(self, inputs: Array, weights: Array | None = None) -> Array:
        """Normalises `[num_examples, ..., num_channels]` by this step's row, and counts it."""
        outputs = super().__call__(inputs, weights)
        self.step[...] = self.step[...] + 1
        return outputs

    def _row(self) -> Array | EllipsisType:
        return jnp.minimum(self.step[...], self.num_steps)

    def _affine(self) -> tuple[Array, Array | None]:
        offset, scale = super()._affine()
        row = self._row() if self.per_step_weights else ...
        return offset[row], None if scale is None else scale[row]


# Not nnx.GroupNorm, whose offset is called bias: a mask by name would depend on the policy.
class GroupNorm(_Learned):
    """Normalises each group of channels of an example by its mean and variance over space.

    Wu and He 2018 (arXiv 1803.08494). One group is layer normalisation.

    Args:
        num_channels: size of the last axis.
        num_groups: a divisor of num_channels.
        scale: whether to learn a scale beside the offset.
        param_dtype: type of the parameters.
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

    def __call__(self, inputs: Array, weights: Array | None = None) -> Array:
        """Normalises `[num_examples, ..., num_channels]`; no example knows of another's weight."""
        del weights
        dtype = jnp.result_type(inputs, self.offset[...])
        values = inputs.astype(jnp.promote_types(dtype, jnp.float32))
        grouped = values.reshape(len(values), -1, self.num_groups, self._group_size(inputs))
        mean = grouped.mean(axis=(1, 3), keepdims=True)
        variance = ((grouped - mean) ** 2).mean(axis=(1, 3), keepdims=True)
        offset = self._in_groups(self.offset[...])
        scale = self._in_groups(self.scale[...]) if self.has_scale else None
        outputs = _line(grouped, mean, variance, offset, scale)
        return outputs.reshape(inputs.shape).astype(dtype)

    def _in_groups(self, vector: Array) -> Array:
        return vector.reshape(1, 1, self.num_groups, -1)

    def _group_size(self, inputs: Array) -> int:
        num_values = math.prod(inputs.shape[1:]) // self.num_groups
        if num_values < 2:
            raise ValueError(
                f"a group of one number normalises to zero: {inputs.shape[-1]} channels in "
                f"{self.num_groups} groups of inputs {inputs.shape}; choose another norm policy"
            )
        return inputs.shape[-1] // self.num_groups


class Identity(nnx.Module):
    """No normalisation, and no parameters."""

    def __call__(self, inputs: Array, weights: Array | None = None) -> Array:
        """The inputs."""
        del weights
        return inputs


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
    """The normalisation of a policy, called `norm(inputs, weights=None)`.

    Inputs are `[num_examples, ..., num_channels]` and weights `[num_examples]`, how much each
    example counts in statistics of the batch. The parameters are `offset` and, with scale, `scale`.

    Args:
        policy: one of `POLICIES`; this module's docstring says what each is.
        num_channels: size of the last axis. "group" divides it into as many groups as it can, 8 at
            most.
        scale: whether to learn a scale beside the offset.
        num_steps: the number of inner steps, for "per_step" and only for it.
        per_step_weights: whether "per_step" learns an offset and a scale for each step too.
        momentum: the share of an average that stays at each batch, for "running" and "per_step".
        param_dtype: type of the parameters. Statistics are computed in float32 at least.

    Returns:
        An NNX module.

    Raises:
        ValueError: an unknown policy, no channels, a momentum outside [0, 1), or num_steps absent
            or negative with "per_step" or given with another policy.

    >>> import jax.numpy as jnp
    >>> from jaxmaml.nn.norm import make_norm
    >>> norm = make_norm("inductive", 1)
    >>> _ = norm(jnp.array([[0.0], [2.0]]))  # the support: mean 1, variance 1
    >>> norm.eval()
    >>> [round(float(x), 2) for x in norm(jnp.array([[1.0], [5.0]]))[:, 0]]  # the query
    [0.0, 4.0]
    """
    if policy not in POLICIES:
        raise ValueError(f"norm must be one of {', '.join(POLICIES)}; got {policy!r}")
    check_positive(num_channels=num_channels)
    num_steps = _check_num_steps(policy, num_steps)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be 0 or more and less than 1, got {momentum}")
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


def cancels_bias(policy: str) -> bool:
    """Whether a bias before the normalisation would have no effect, in training mode."""
    return policy in ("transductive", "inductive", "running", "per_step")


def _check_num_steps(policy: str, num_steps: int | None) -> int:
    if policy != "per_step":
        if num_steps is not None:
            raise ValueError(f"num_steps is for norm='per_step' only; got norm={policy!r}")
        return 0
    if num_steps is None or num_steps < 0:
        raise ValueError(
            f"norm='per_step' needs num_steps, the number of inner steps; got {num_steps}"
        )
    return num_steps


def _num_groups(num_channels: int) -> int:
    return max(n for n in range(1, min(8, num_channels) + 1) if num_channels % n == 0)


def _line(values: Array, mean: Array, variance: Array, offset: Array, scale: Array | None) -> Array:
    factor = jax.lax.rsqrt(variance + NORM_EPS)
    if scale is not None:
        factor = factor * scale
    # One line of x, and not a product of deviations, which would be kept beside x: with 75 query
    # images this takes a fifth off an outer step of Conv4 on a CPU, where memory is what costs.
    return values * factor + (offset - mean * factor)


def _batch_mean(values: Array, weights: Array | None) -> Array:
    """Mean over all axes but the last, which are kept with size 1."""
    axes = tuple(range(values.ndim - 1))
    if weights is None:
        return values.mean(axis=axes, keepdims=True)
    means = values.mean(axis=axes[1:], keepdims=True)
    column = jnp.asarray(weights, values.dtype).reshape((-1,) + (1,) * (values.ndim - 1))
    return (column * means).sum(axis=0, keepdims=True) / column.sum()
