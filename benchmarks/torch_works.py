"""The PyTorch side of `meta_rl.py`: the comparison with our results, and the works that are timed."""

import os
from collections.abc import Callable, Iterable

import common
import jax
import torch
import torch_rl
from rl_works import INNER_LR, OUTER_LR, Reference, Setup
from torch_rl import FORMS, Batch, Group, Maml
from torch_rollouts import Tensors, draw_noise

from jaxmaml.types import Params

Errors = dict[str, float]
"""The relative error of each result, by the values of `rl.WORKS`."""


def errors_from_noise(setup: Setup, params: Params, ours: Reference) -> dict[str, Errors]:
    """Returns the errors of each form, which samples with the random numbers of our side.

    Args:
        setup: the work.
        params: the parameters.
        ours: our results from these parameters.
    """
    torch.set_num_threads(1)  # beside other work, two are many times slower
    support, query = _batches(ours)
    noise = torch_rl.noise_of(support), torch_rl.noise_of(query)
    goals = torch_rl.to_tensor(ours.goals)

    def errors(maml: Maml) -> Errors:
        groups = maml.replaying(goals, *noise)
        tensors = torch_rl.convert(params)
        sampled = [group.support(tensors) for group in groups]
        expected = [group.support(tensors) for group in maml.given(support, query)]
        rollouts = max(
            _error(
                [getattr(batch, name) for batch in sampled], [getattr(b, name) for b in expected]
            )
            for name in ("observations", "actions", "mean", "log_probs", "mask", "advantages")
        )

        # A step of TRPO changes the parameters in place.
        start, end = _vector(params), _vector(ours.stepped)
        torch_rl.trpo_step(maml, setup.trpo, tensors, groups)
        moved = torch_rl.flat(tensors.values()) - start
        derivatives = _errors_of_derivatives(maml, params, groups, ours)
        return {**derivatives, "rollouts": rollouts, "trpo-exact": _error([moved], [end - start])}

    return {name: errors(Maml(setup.problem, form, INNER_LR)) for name, form in FORMS.items()}


def errors_on_batches(setup: Setup, params: Params, ours: Reference) -> dict[str, Errors]:
    """Returns the errors of each form on the trajectories of our side; see `errors_from_noise`."""
    torch.set_num_threads(1)
    mamls = {name: Maml(setup.problem, form, INNER_LR) for name, form in FORMS.items()}
    return {
        name: _errors_of_derivatives(maml, params, maml.given(*_batches(ours)), ours)
        for name, maml in mamls.items()
    }


def _errors_of_derivatives(
    maml: Maml, params: Params, groups: list[Group], ours: Reference
) -> Errors:
    found: Errors = {}
    for order, expected in ours.grads.items():
        tensors = torch_rl.convert(params)
        maml._replace(exact=order == "exact").meta_grad(tensors, groups)
        grads = [leaf.grad for leaf in tensors.values() if leaf.grad is not None]
        found[f"gradient-{order}"] = _error(grads, [_vector(expected)])
    tensors = torch_rl.convert(params)
    divergence = maml.mean_scores(tensors, groups)[1]
    product = torch_rl.hessian(divergence, list(tensors.values()), damping=0.0)
    found["kl-products"] = _error([product(_vector(ours.grads["exact"]))], [_vector(ours.product)])
    return found


def _batches(ours: Reference) -> tuple[Batch, Batch]:
    """The batches of our side, those of the only inner step."""
    support = jax.tree.map(lambda leaf: leaf[:, 0], ours.batches.support)
    return torch_rl.convert_batch(support), torch_rl.convert_batch(ours.batches.query)


def _vector(params: Params) -> torch.Tensor:
    return torch_rl.flat(torch_rl.convert(params).values()).detach()


def _error(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """||found - expected|| / ||expected||."""
    one, other = torch_rl.flat(found).detach(), torch_rl.flat(expected).detach()
    return float((one - other).norm() / other.norm())


def works(setup: Setup, work: str) -> dict[str, tuple[int, Callable[[], None]]]:
    """Returns (number of threads, call) of each form of a work, with the faster number of threads.

    Args:
        setup: the work.
        work: a name of `rl.WORKS`.
    """
    found = {}
    for name, form in FORMS.items():
        maml = Maml(setup.problem, form, INNER_LR, exact=not work.endswith("first"))
        found[name] = _with_best_threads(_call(setup, work, maml))
    return found


def _call(setup: Setup, work: str, maml: Maml) -> Callable[[], None]:
    params = torch_rl.convert(setup.params)
    optimizer = torch.optim.Adam(list(params.values()), lr=OUTER_LR, fused=True)  # the fastest
    draw_goals = lambda: torch.rand(setup.source.num_tasks, 2) - 0.5

    def rollouts() -> None:
        for goals in maml.parts(draw_goals()):
            maml.rollout(params, goals, draw_noise(maml.problem, goals))

    def sampling() -> None:
        constant = maml._replace(exact=False)  # nothing is differentiated twice
        for group in maml.sampling(draw_goals()):
            group.query(constant.adapt(params, group.support(params)))

    def adam() -> None:
        maml.meta_grad(params, maml.sampling(draw_goals()))
        optimizer.step()

    def trpo() -> None:
        torch_rl.trpo_step(maml, setup.trpo, params, maml.sampling(draw_goals()))

    calls = {
        "rollouts": rollouts, "sampling": sampling, "adam-exact": adam, "adam-first": adam,
        "trpo-exact": trpo,
    }  # fmt: skip
    return calls[work] if work in calls else _part(setup, work, maml, params, draw_goals())


def _part(
    setup: Setup, work: str, maml: Maml, params: Tensors, goals: torch.Tensor
) -> Callable[[], None]:
    """A part of a meta-iteration, on batches that were sampled before."""
    groups = maml.mean_scores(params, maml.sampling(goals))[2]
    if work != "kl-products":
        return lambda: maml.meta_grad(params, groups)
    leaves = list(params.values())

    def products() -> None:
        product = torch_rl.hessian(maml.mean_scores(params, groups)[1], leaves, damping=0.0)
        vector = torch_rl.flat(leaves).detach()
        for _ in range(setup.trpo.num_cg_steps + 1):
            image = product(vector)
            vector = image / image.norm()

    return products


def _with_best_threads(call: Callable[[], None]) -> tuple[int, Callable[[], None]]:
    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        call()

    seconds: dict[int, float] = {}
    for number in sorted({1, os.cpu_count() or 1}):
        # The first call may allocate. Beside other work, threads that spin are far slower.
        first = common.seconds_of(lambda number=number: run(number))
        is_slow = seconds and first > 4 * min(seconds.values())
        seconds[number] = first if is_slow else common.seconds_of(lambda n=number: run(n))
    best = min(seconds, key=lambda number: seconds[number])
    return best, lambda: run(best)
