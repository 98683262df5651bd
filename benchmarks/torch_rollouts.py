"""2D navigation, a Gaussian policy, rollouts and advantages in PyTorch, as `jaxmaml.rl` has them.

Tasks are computed in groups: a single task, without a task axis, or all tasks, with a leading task axis
and batched matrix products. "..." in the shape of a tensor is this axis or nothing.

Parameters are a flat dictionary. Their names are jaxmaml's paths with "_" instead of "/".
"""

import functools
import math
from typing import NamedTuple, Protocol

import numpy as np
import torch

from jaxmaml import rl
from jaxmaml.rl.baselines import REGULARIZATION, ROUNDING
from jaxmaml.rl.policies import MIN_LOG_STD

Tensors = dict[str, torch.Tensor]


class Trajectories(NamedTuple):
    """Trajectories of a group, as `jaxmaml.rl.Trajectories`, with the output of the policy.

    Attributes:
        observations, actions, mean: `[..., num_trajectories, horizon, 2]`.
        log_std: of a shape that broadcasts to `mean`.
        log_probs, rewards, mask: `[..., num_trajectories, horizon]`.
    """

    observations: torch.Tensor
    actions: torch.Tensor
    mean: torch.Tensor
    log_std: torch.Tensor
    log_probs: torch.Tensor
    rewards: torch.Tensor
    mask: torch.Tensor


class Environment(Protocol):
    """The environments of a group, one per trajectory, `[..., num_trajectories]`."""

    def __init__(self, goals: torch.Tensor, num_trajectories: int): ...

    def reset(self) -> torch.Tensor:
        """Returns the first observations."""
        ...

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (observations, rewards, whether the episodes end)."""
        ...


class Together:
    """2D navigation, with all environments of a group in one tensor."""

    def __init__(self, goals: torch.Tensor, num_trajectories: int):
        self._goals = goals.unsqueeze(-2)
        self._positions = goals.new_zeros(*goals.shape[:-1], num_trajectories, 2)

    def reset(self) -> torch.Tensor:
        """Returns the first observations."""
        self._positions = torch.zeros_like(self._positions)
        return self._positions

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (observations, rewards, whether the episodes end)."""
        self._positions = torch.add(self._positions, actions.clamp(-1, 1), alpha=0.1)
        offsets = self._positions - self._goals
        return self._positions, -offsets.norm(dim=-1), (offsets.abs() < 0.01).all(-1)


class Navigation:
    """2D navigation of one point, with the methods of Gym's environments."""

    def __init__(self, goal: np.ndarray):
        self._goal, self._position = goal, np.zeros_like(goal)

    def reset(self) -> np.ndarray:
        """Returns the first observation."""
        self._position = np.zeros_like(self._goal)
        return self._position

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Returns (observation, reward, whether the episode ends)."""
        self._position = self._position + 0.1 * np.clip(action, -1, 1)
        x, y = self._position - self._goal
        return self._position, -math.hypot(x, y), bool(abs(x) < 0.01 and abs(y) < 0.01)


class Separate:
    """2D navigation of one task, one environment after the other, as in Gym's SyncVectorEnv."""

    def __init__(self, goals: torch.Tensor, num_trajectories: int):
        self._environments = [Navigation(goals.numpy()) for _ in range(num_trajectories)]

    def reset(self) -> torch.Tensor:
        """Returns the first observations."""
        return torch.from_numpy(np.stack([each.reset() for each in self._environments]))

    def step(self, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (observations, rewards, whether the episodes end)."""
        pairs = zip(self._environments, actions.numpy(), strict=True)
        positions, rewards, done = zip(*(each.step(action) for each, action in pairs), strict=True)
        found = torch.from_numpy(np.stack(positions))
        return found, found.new_tensor(rewards), torch.tensor(done)


def draw_noise(problem: rl.Problem, goals: torch.Tensor) -> torch.Tensor:
    """Returns the normal numbers of a rollout, `[horizon, ..., num_trajectories, 2]`."""
    sizes = problem.horizon, *goals.shape[:-1], problem.num_trajectories, 2
    return torch.randn(sizes, dtype=goals.dtype)


@torch.no_grad()
def rollout(
    problem: rl.Problem,
    environment: type[Environment],
    params: Tensors,
    goals: torch.Tensor,
    noise: torch.Tensor,
) -> Trajectories:
    """Returns the trajectories of a group.

    Args:
        problem: its numbers are used.
        environment: the environments.
        params: those of the policy, with or without a task axis.
        goals: the tasks, `[..., 2]`.
        noise: see `draw_noise`.
    """
    made = environment(goals, problem.num_trajectories)
    observations = made.reset()
    alive = torch.ones(observations.shape[:-1], dtype=torch.bool)
    layers, log_std = layers_of(params), log_std_of(params, observations)
    deviation = log_std.exp().expand_as(observations)
    steps: list[tuple[torch.Tensor, ...]] = []
    for draw in noise:
        mean = forward(layers, observations)
        actions = torch.addcmul(mean, deviation, draw)
        before = observations, actions, mean
        observations, rewards, done = made.step(actions)
        steps.append((*before, torch.where(alive, rewards, 0), alive))
        alive = alive & ~done

    # A step is a column: the horizon comes after the trajectories.
    columns = list(zip(*steps, strict=True))
    seen, actions, mean = (torch.stack(column, -2) for column in columns[:3])
    rewards, mask = (torch.stack(column, -1) for column in columns[3:])
    log_std = log_std_of(params, seen)
    log_probs = log_prob(actions, mean, log_std)
    return Trajectories(seen, actions, mean, log_std, log_probs, rewards, mask.to(rewards.dtype))


def layers_of(params: Tensors) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns (kernel, bias) of each layer."""
    names = [name.removesuffix("kernel") for name in params if name.endswith("kernel")]
    return [(params[f"{name}kernel"], params[f"{name}bias"]) for name in names]


def log_std_of(params: Tensors, observations: torch.Tensor) -> torch.Tensor:
    """Returns the log standard deviations, in a shape that broadcasts to the observations."""
    log_std = params["log_std"].clamp(min=MIN_LOG_STD)
    return log_std.reshape(*log_std.shape[:-1], *[1] * (observations.ndim - log_std.ndim), -1)


def forward(
    layers: list[tuple[torch.Tensor, torch.Tensor]], observations: torch.Tensor
) -> torch.Tensor:
    """Returns the means of the actions, for layers with or without a task axis."""
    has_tasks = layers[0][0].ndim == 3
    rows = observations.flatten(int(has_tasks), -2)
    for number, (kernel, bias) in enumerate(layers):
        rows = torch.relu(rows) if number else rows
        if has_tasks:
            rows = torch.baddbmm(bias.unsqueeze(1), rows, kernel)
        else:
            rows = torch.addmm(bias, rows, kernel)
    return rows.reshape(*observations.shape[:-1], -1)


def policy(params: Tensors, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean and the log standard deviation of the actions."""
    return forward(layers_of(params), observations), log_std_of(params, observations)


def log_prob(actions: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Returns the log-likelihood of actions under a Gaussian with independent coordinates."""
    scaled = (actions - mean) * (-log_std).exp()
    return -(0.5 * scaled.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def kl(
    mean: torch.Tensor, log_std: torch.Tensor, new_mean: torch.Tensor, new_log_std: torch.Tensor
) -> torch.Tensor:
    """Returns the divergence KL(old || new) of two Gaussians."""
    distance = (2 * log_std).exp() + (mean - new_mean).square()
    return (new_log_std - log_std + 0.5 * distance * (-2 * new_log_std).exp() - 0.5).sum(-1)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns the mean over the steps that count, one per task."""
    return (values * mask).sum((-2, -1)) / mask.sum((-2, -1)).clamp(min=1)


def advantages(found: Trajectories, discount: float, gae_lambda: float) -> torch.Tensor:
    """Returns what `jaxmaml.rl.advantages` does with `jaxmaml.rl.linear_baseline`."""
    mask, rewards = found.mask, found.rewards
    values = _baseline(found, _backward_sum(rewards, discount))
    after = torch.nn.functional.pad(values[..., 1:], (0, 1))
    errors = (rewards + discount * after - values) * mask
    estimates = _backward_sum(errors, discount * gae_lambda) * mask

    # Normalize.
    average = lambda numbers: masked_mean(numbers, mask)[..., None, None]
    centered = estimates - average(estimates)
    deviation = average(centered.square()).sqrt()
    size = average((estimates + values).square()).sqrt()
    return centered * mask / (deviation + ROUNDING * size + 1e-8)


def _baseline(found: Trajectories, targets: torch.Tensor) -> torch.Tensor:
    """The linear baseline, fitted to the returns of each task by ridge regression."""
    mask, seen = found.mask, found.observations.clamp(-10, 10)
    time = torch.arange(mask.shape[-1], dtype=mask.dtype).unsqueeze(-1) / 100
    powers = torch.cat([time, time**2, time**3, torch.ones_like(time)], -1)
    features = torch.cat([seen, seen**2, powers.expand(*mask.shape, -1)], -1)
    rows, weights = features.flatten(-3, -2), mask.flatten(-2, -1).unsqueeze(-1)
    count = weights.sum(-2, keepdim=True).clamp(min=1)
    sizes = ((rows.square() * weights).sum(-2, keepdim=True) / count).sqrt()
    rows = rows / torch.where(sizes > 0, sizes, 1)

    weighted = (rows * weights).mT
    ridge = REGULARIZATION * count * torch.eye(rows.shape[-1], dtype=rows.dtype)
    target = weighted @ targets.flatten(-2, -1).unsqueeze(-1)
    solution = torch.linalg.solve(weighted @ rows + ridge, target)
    return (rows @ solution).reshape(mask.shape) * mask


def _backward_sum(values: torch.Tensor, factor: float) -> torch.Tensor:
    """x_t + factor x_{t+1} + factor² x_{t+2} + ... along the last axis, as one matrix product."""
    return values @ _powers(values.shape[-1], factor, values.dtype)


@functools.cache
def _powers(horizon: int, factor: float, dtype: torch.dtype) -> torch.Tensor:
    time = np.arange(horizon)
    matrix = np.tril(factor ** np.maximum(time[:, None] - time, 0))
    return torch.from_numpy(matrix).to(dtype)
