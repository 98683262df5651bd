"""jaxmaml's networks in PyTorch, with jaxmaml's weights, and the comparison of gradients.

Parameters are a flat dictionary. Their names are jaxmaml's paths with "_" instead of "/":
conv_0_kernel, norm_0_offset, head_bias.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import torch.nn.functional as F
import torchbench

from jaxmaml.experiments.presets import Preset
from jaxmaml.nn.normalizer import NORM_EPS
from jaxmaml.types import MetaParams, Task

Tensors = dict[str, torch.Tensor]
Data = tuple[torch.Tensor, torch.Tensor]
"""(inputs, targets), of one task, or of all tasks with a leading task axis."""
Apply = Callable[[Tensors, torch.Tensor], torch.Tensor]
Norm = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(features, scale, offset) -> features`, normalized by the statistics of the batch."""


class Model(NamedTuple):
    """A work as a peer needs it.

    Attributes:
        apply: `(params, inputs) -> outputs`.
        apply_by_moments: the same, with the normalization written out as means of its inputs.
        score: `(outputs, targets) -> mean loss`.
        params: the initial parameters, without gradient tracking.
        adapted: the names of the parameters that the inner loop adapts.
        support: inputs and targets, `[num_tasks, way*shot, ...]`.
        query: inputs and targets, `[num_tasks, way*query, ...]`.
        inner_lr: the rate of the inner SGD.
        num_inner_steps: the steps of the inner SGD.
        exact: whether the meta-gradient is exact; otherwise it is first order.
    """

    apply: Apply
    apply_by_moments: Apply
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    params: Tensors
    adapted: tuple[str, ...]
    support: Data
    query: Data
    inner_lr: float
    num_inner_steps: int
    exact: bool

    def loss(self, params: Tensors, batch: Data) -> torch.Tensor:
        """Returns the mean loss of one task's batch."""
        return self.score(self.apply(params, batch[0]), batch[1])

    def tasks(self) -> list[tuple[Data, Data]]:
        """Returns (support, query) of each task."""
        return list(
            zip(zip(*self.support, strict=True), zip(*self.query, strict=True), strict=True)
        )


def convert(
    preset: Preset, order: str, params: MetaParams, tasks: Task, *, pool: str = "max_pool2d"
) -> Model:
    """Returns a work for PyTorch.

    Args:
        preset: the work.
        order: "exact" or "first".
        params: the parameters, in jaxmaml's layout.
        tasks: the tasks, in jaxmaml's layout.
        pool: "max_pool2d", PyTorch's own pooling, or "maximum", the maximum of strided slices, whose
            second derivative is faster.
    """
    tensors = {name: _to_torch(name, leaf, preset) for name, leaf in _flat(params).items()}
    adapted = tuple(name for name in tensors if preset.adapt_norm or not name.startswith("norm"))
    return Model(
        _apply(preset, pool, _batch_norm), _apply(preset, pool, _norm_by_moments),
        F.mse_loss if preset.is_regression else F.cross_entropy,
        tensors, adapted, data(tasks.support, preset), data(tasks.query, preset),
        preset.inner_lr, preset.num_inner_steps, order == "exact",
    )  # fmt: skip


def data(batch: Mapping[str, Any], preset: Preset) -> Data:
    """Returns (inputs, targets) of all tasks in PyTorch's layout.

    Args:
        batch: the support or the query of tasks, in jaxmaml's layout.
        preset: the work.
    """
    inputs, targets = np.array(batch["inputs"]), np.array(batch["targets"])
    if preset.model == "conv":
        inputs = inputs[:, :, ::-1, ::-1] if _is_strided(preset) else inputs
        inputs = inputs.transpose(0, 1, 4, 2, 3)
    elif not preset.is_regression:
        inputs = inputs.reshape(*inputs.shape[:2], -1)
    targets = targets if preset.is_regression else targets.astype(np.int64)
    arrays = np.ascontiguousarray(inputs), targets
    converted = (torch.from_numpy(array).to(device()) for array in arrays)
    return next(converted), next(converted)


def restore(tensors: Tensors, like: MetaParams, preset: Preset) -> MetaParams:
    """Returns parameters in jaxmaml's layout, the inverse of `convert`.

    Args:
        tensors: the parameters of a peer.
        like: parameters in jaxmaml's layout.
        preset: the work.
    """
    names, structure = list(_flat(like)), jax.tree.structure(like)
    leaves = [
        _from_torch(name, tensors[name].detach().cpu().numpy(), leaf.shape, preset)
        for name, leaf in zip(names, jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def device() -> torch.device:
    """Returns the device of the peers: the GPU if jaxmaml runs on one."""
    is_cuda = jax.default_backend() == "gpu" and torch.cuda.is_available()
    return torch.device("cuda" if is_cuda else "cpu")


def synchronize() -> None:
    """Waits until the device has done what it was given."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def relative_error(gradient: Tensors, reference: MetaParams, preset: Preset) -> float:
    """Returns ||gradient - reference|| / ||reference||, without leaves of zero gradient.

    Args:
        gradient: a meta-gradient of a peer.
        reference: jaxmaml's meta-gradient, in its own layout.
        preset: the work.
    """
    expected = {name: _to_torch(name, leaf, preset) for name, leaf in _flat(reference).items()}
    total = sum(float(leaf.norm() ** 2) for leaf in expected.values())
    # The gradient of a bias before a normalization, for example, is rounding only.
    names = [name for name, leaf in expected.items() if leaf.norm() ** 2 > 1e-12 * total]
    error = sum(float((gradient[name] - expected[name]).norm() ** 2) for name in names)
    return (error / total) ** 0.5


def _flat(params: MetaParams) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="_"): np.array(leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
    }


def _is_strided(preset: Preset) -> bool:
    return preset.model == "conv" and not preset.pooled


def _to_torch(name: str, leaf: np.ndarray, preset: Preset) -> torch.Tensor:
    """Returns a parameter in PyTorch's layout."""
    if name.startswith("conv") and leaf.ndim == 4:
        # JAX's "SAME" pads an even side by 0 before and 1 after it. PyTorch pads by 1 and 1, and
        # stride 2 never reads the last one. The two agree without a copy into a padded image if
        # images and kernels are rotated by 180 degrees.
        leaf = leaf[::-1, ::-1] if _is_strided(preset) else leaf
        leaf = leaf.transpose(3, 2, 0, 1)
    elif name == "head_kernel" and preset.model == "conv":
        num_filters = preset.num_filters
        # Features are flattened as [space, channels] in jaxmaml and [channels, space] here.
        leaf = leaf.reshape(-1, num_filters, leaf.shape[-1]).transpose(2, 1, 0)
        leaf = leaf.reshape(leaf.shape[0], -1)
    elif name.endswith("kernel"):
        leaf = leaf.T
    return torch.from_numpy(np.ascontiguousarray(leaf)).to(device())


def _from_torch(name: str, leaf: np.ndarray, shape: tuple[int, ...], preset: Preset) -> np.ndarray:
    """Returns a parameter in jaxmaml's layout and shape, the inverse of `_to_torch`."""
    if name.startswith("conv") and leaf.ndim == 4:
        leaf = leaf.transpose(2, 3, 1, 0)
        leaf = leaf[::-1, ::-1] if _is_strided(preset) else leaf
    elif name == "head_kernel" and preset.model == "conv":
        leaf = leaf.reshape(shape[-1], preset.num_filters, -1).transpose(2, 1, 0).reshape(shape)
    elif name.endswith("kernel"):
        leaf = leaf.T
    # A copy: an optimizer changes the tensor in place.
    return np.array(leaf)


def _apply(preset: Preset, pool: str, norm: Norm) -> Apply:
    """Returns `(params, inputs) -> outputs` of a preset's network."""
    if preset.model == "mlp":
        return lambda params, inputs: _mlp(params, inputs, len(preset.hidden_sizes), norm)
    pools = {"max_pool2d": lambda x: F.max_pool2d(x, 2), "maximum": _pool_by_maximum}
    chosen = pools[pool] if preset.pooled else None
    padding = 0 if preset.name == torchbench.PRESET.name else 1
    return lambda params, inputs: _conv(params, inputs, chosen, padding, norm)


def _conv(
    params: Tensors,
    features: torch.Tensor,
    pool: Callable[[torch.Tensor], torch.Tensor] | None,
    padding: int,
    norm: Norm,
) -> torch.Tensor:
    num_blocks = sum(name.startswith("conv") and name.endswith("kernel") for name in params)
    for i in range(num_blocks):
        kernel, bias = params[f"conv_{i}_kernel"], params.get(f"conv_{i}_bias")
        features = F.conv2d(features, kernel, bias, stride=1 if pool else 2, padding=padding)
        features = F.relu(norm(features, *_scale_and_offset(params, i)))
        features = pool(features) if pool else features
    features = features.flatten(1) if pool else features.mean((2, 3))
    return F.linear(features, params["head_kernel"], params["head_bias"])


def _mlp(params: Tensors, features: torch.Tensor, num_hidden: int, norm: Norm) -> torch.Tensor:
    for i in range(num_hidden):
        features = F.linear(features, params[f"dense_{i}_kernel"], params.get(f"dense_{i}_bias"))
        if f"norm_{i}_offset" in params:
            features = norm(features, *_scale_and_offset(params, i))
        features = F.relu(features)
    return F.linear(features, params["head_kernel"], params["head_bias"])


def _scale_and_offset(params: Tensors, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    offset = params[f"norm_{layer}_offset"]
    # Ones in place of no scale: PyTorch's second derivative of the offset fails on None.
    return params.get(f"norm_{layer}_scale", torch.ones_like(offset)), offset


def _batch_norm(features: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(features, None, None, scale, offset, training=True, eps=NORM_EPS)


def _norm_by_moments(
    features: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    axes = [0, *range(2, features.ndim)]
    variance, mean = torch.var_mean(features, axes, unbiased=False, keepdim=True)
    shape = (1, -1, *[1] * (features.ndim - 2))
    normed = (features - mean) / torch.sqrt(variance + NORM_EPS)
    return normed * scale.view(shape) + offset.view(shape)


def _pool_by_maximum(features: torch.Tensor) -> torch.Tensor:
    height, width = features.shape[-2] // 2 * 2, features.shape[-1] // 2 * 2
    even_rows, odd_rows = (features[..., i:height:2, :width] for i in (0, 1))
    rows = torch.maximum(even_rows, odd_rows)
    return torch.maximum(rows[..., 0::2], rows[..., 1::2])
