"""MAML for reinforcement learning in PyTorch, on 2D navigation: the other side of `meta_rl.py`.

There are three forms, from that of published implementations to the fastest. They share every function;
they differ in how environments are stepped, and in whether tasks are computed one after the other.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch_rollouts import (
    Environment,
    Separate,
    Tensors,
    Together,
    Trajectories,
    advantages,
    draw_noise,
    kl,
    log_prob,
    masked_mean,
    policy,
    rollout,
)

from jaxmaml import rl
from jaxmaml.types import Params

CG_TOLERANCE = 1e-5
"""Conjugate gradients end at this residual, relative to the right-hand side, as JAX's do."""


class Batch(NamedTuple):
    """Trajectories of a group with what the losses need, as `jaxmaml.rl.Experience`.

    Attributes:
        observations, actions, mean, log_std, log_probs, mask: as in `Trajectories`.
        advantages: like `mask`.
    """

    observations: torch.Tensor
    actions: torch.Tensor
    mean: torch.Tensor
    log_std: torch.Tensor
    log_probs: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor


Source = Callable[[Tensors], Batch]
"""Samples the batch of a group with some parameters, or returns one that was sampled before."""


class Group(NamedTuple):
    """Tasks that are computed at once.

    Attributes:
        support: the source of the batch before adaptation.
        query: the source of the batch after it.
    """

    support: Source
    query: Source


class Scored(NamedTuple):
    """The query of a group under some parameters, which can be differentiated.

    Attributes:
        loss: the mean surrogate.
        kl: the mean divergence from the policies that sampled the query.
        support, query: the batches.
    """

    loss: torch.Tensor
    kl: torch.Tensor
    support: Batch
    query: Batch

    def held(self) -> Group:
        """Returns the group with these batches."""
        return Group(_held(self.support), _held(self.query))


def _held(batch: Batch) -> Source:
    return lambda _: batch


class Form(NamedTuple):
    """A way to write the work.

    Attributes:
        environment: how environments are stepped.
        at_once: whether all tasks are one group; otherwise each is one.
    """

    environment: type[Environment]
    at_once: bool


FORMS: dict[str, Form] = {
    "environment by environment": Form(Separate, at_once=False),
    "task by task": Form(Together, at_once=False),
    "all tasks at once": Form(Together, at_once=True),
}


class Maml(NamedTuple):
    """MAML of a policy with one inner step.

    Attributes:
        problem: its numbers say how trajectories are sampled and scored.
        form: how it is written.
        inner_lr: the rate of the inner step.
        exact: whether the meta-gradient is exact; otherwise it is first order.
    """

    problem: rl.Problem
    form: Form
    inner_lr: float
    exact: bool = True

    def parts(self, tensor: torch.Tensor, dim: int = 0) -> list[torch.Tensor]:
        """Returns the part of each group of a tensor with a task axis."""
        return [tensor] if self.form.at_once else list(tensor.unbind(dim))

    def rollout(self, params: Tensors, goals: torch.Tensor, noise: torch.Tensor) -> Trajectories:
        """Returns the trajectories of a group, see `torch_rollouts.rollout`."""
        return rollout(self.problem, self.form.environment, params, goals, noise)

    @torch.no_grad()
    def experience(self, params: Tensors, goals: torch.Tensor, noise: torch.Tensor) -> Batch:
        """Returns a rollout with advantages from a baseline fitted to it."""
        found = self.rollout(params, goals, noise)
        return Batch(
            found.observations, found.actions, found.mean, found.log_std, found.log_probs,
            found.mask, advantages(found, self.problem.discount, self.problem.gae_lambda),
        )  # fmt: skip

    def sampling(self, goals: torch.Tensor) -> list[Group]:
        """Returns the groups of tasks `[num_tasks, 2]`, which sample at each call."""

        def source(goals: torch.Tensor) -> Source:
            return lambda params: self.experience(params, goals, draw_noise(self.problem, goals))

        return [Group(source(part), source(part)) for part in self.parts(goals)]

    def replaying(
        self, goals: torch.Tensor, before: torch.Tensor, after: torch.Tensor
    ) -> list[Group]:
        """Returns the groups of tasks that sample with the given noise before and after adaptation."""

        def sources(noise: torch.Tensor) -> list[Source]:
            pairs = zip(self.parts(goals), self.parts(noise, 1), strict=True)
            return [
                functools.partial(self.experience, goals=part, noise=numbers)
                for part, numbers in pairs
            ]

        return [Group(*pair) for pair in zip(sources(before), sources(after), strict=True)]

    def given(self, support: Batch, query: Batch) -> list[Group]:
        """Returns the groups of batches with a task axis, which were sampled before."""

        def split(batch: Batch) -> list[Source]:
            leaves = zip(*map(self.parts, batch), strict=True)
            return [_held(Batch(*part)) for part in leaves]

        return [Group(*pair) for pair in zip(split(support), split(query), strict=True)]

    def adapt(self, params: Tensors, batch: Batch) -> Tensors:
        """Returns the parameters after the inner step, with a task axis if the batch has one."""
        if batch.mask.ndim == 3:
            num_tasks = len(batch.mask)
            params = {name: leaf.expand(num_tasks, *leaf.shape) for name, leaf in params.items()}
        log_probs = log_prob(batch.actions, *policy(params, batch.observations))
        loss = -masked_mean(log_probs * batch.advantages, batch.mask).sum()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=self.exact)
        pairs = zip(params.items(), grads, strict=True)
        return {name: leaf - self.inner_lr * grad for (name, leaf), grad in pairs}

    def score(self, params: Tensors, group: Group) -> Scored:
        """Samples the batches of a group, and returns the losses on its query."""
        support = group.support(params)
        adapted = self.adapt(params, support)
        query = group.query(adapted)
        mean, log_std = policy(adapted, query.observations)
        ratio = (log_prob(query.actions, mean, log_std) - query.log_probs).exp()
        loss = -masked_mean(ratio * query.advantages, query.mask).mean()
        divergence = kl(query.mean, query.log_std, mean, log_std)
        return Scored(loss, masked_mean(divergence, query.mask).mean(), support, query)

    def meta_grad(self, params: Tensors, groups: list[Group]) -> None:
        """Leaves the mean meta-gradient in `.grad` of the parameters."""
        for leaf in params.values():
            leaf.grad = None
        # One backward pass per group, so that one graph is alive at a time.
        for group in groups:
            (self.score(params, group).loss / len(groups)).backward()

    def mean_scores(
        self, params: Tensors, groups: list[Group]
    ) -> tuple[torch.Tensor, torch.Tensor, list[Group]]:
        """Returns the mean loss and divergence, and the groups with the batches that were used."""
        scored = [self.score(params, group) for group in groups]
        loss, divergence = (torch.stack([each[i] for each in scored]).mean() for i in (0, 1))
        return loss, divergence, [each.held() for each in scored]


def trpo_step(maml: Maml, trpo: rl.Trpo, params: Tensors, groups: list[Group]) -> bool:
    """Makes a step of trust region policy optimization; returns whether one was accepted."""
    # The direction.
    leaves = list(params.values())
    loss, divergence, groups = maml.mean_scores(params, groups)
    gradient = flat(torch.autograd.grad(loss, leaves, retain_graph=True))
    fisher = hessian(divergence, leaves, trpo.damping)
    direction = conjugate_gradients(fisher, gradient, trpo.num_cg_steps)
    longest = torch.sqrt(2 * trpo.max_kl / (direction @ fisher(direction)).clamp(min=1e-38))

    # The longest step within the trust region, shortened until it is an improvement.
    start, loss = flat(leaves).detach(), loss.detach()
    constant = maml._replace(exact=False)  # nothing is differentiated twice
    for number in range(trpo.num_line_search_steps):
        _assign(leaves, start - longest * trpo.shrink**number * direction)
        new_loss, new_kl, _ = constant.mean_scores(params, groups)
        if new_loss < loss and new_kl <= trpo.max_kl:
            return True
    _assign(leaves, start)
    return False


def hessian(
    divergence: torch.Tensor, leaves: list[torch.Tensor], damping: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the product of a flat vector with the damped Hessian of a divergence.

    The graph of the gradient is made once, and kept.
    """
    gradient = flat(torch.autograd.grad(divergence, leaves, create_graph=True))

    def product(vector: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(gradient @ vector, leaves, retain_graph=True)
        return flat(found) + damping * vector

    return product


def conjugate_gradients(
    product: Callable[[torch.Tensor], torch.Tensor], target: torch.Tensor, num_steps: int
) -> torch.Tensor:
    """Returns an approximate solution of `product(x) = target`."""
    solution, residual, direction = torch.zeros_like(target), target, target
    square = residual @ residual
    limit = CG_TOLERANCE**2 * square
    for _ in range(num_steps):
        if square <= limit:
            break
        image = product(direction)
        rate = square / (direction @ image)
        solution, residual = solution + rate * direction, residual - rate * image
        before, square = square, residual @ residual
        direction = residual + square / before * direction
    return solution


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns all numbers of some tensors as a vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def _assign(leaves: list[torch.Tensor], numbers: torch.Tensor) -> None:
    parts = numbers.split([leaf.numel() for leaf in leaves])
    for leaf, part in zip(leaves, parts, strict=True):
        leaf.copy_(part.view_as(leaf))


def convert(params: Params) -> Tensors:
    """Returns parameters or a gradient of jaxmaml as tensors, which are leaves of a graph."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="_"): to_tensor(leaf).requires_grad_()
        for path, leaf in jax.tree.leaves_with_path(params)
    }


def convert_batch(found: rl.Experience) -> Batch:
    """Returns a batch of jaxmaml, with a leading task axis."""
    mean, log_std = found.distribution
    leaves = (
        found.observations, found.actions, mean, log_std[:, None, None], found.log_probs,
        found.mask, found.advantages,
    )  # fmt: skip
    return Batch(*map(to_tensor, leaves))


def noise_of(batch: Batch) -> torch.Tensor:
    """Returns the normal numbers that a batch was sampled with, as `draw_noise`."""
    return ((batch.actions - batch.mean) * (-batch.log_std).exp()).movedim(-2, 0)


def to_tensor(leaf: Any) -> torch.Tensor:
    """Returns a copy of an array of JAX or NumPy."""
    return torch.from_numpy(np.array(leaf))
