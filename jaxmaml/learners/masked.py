"""The learners whose inner loop adapts one part of the parameters: ANIL, BOIL, CAVIA."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxmaml import trees
from jaxmaml.learners.hyperparams import Optimizer
from jaxmaml.learners.inner_loop import Start, StartFn, inner_loop, loop_options, plain_start
from jaxmaml.types import Batch, LossFn, MetaLearner, Params, State


def masked_inner_loop(
    loss_fn: LossFn,
    optimizer: Optimizer,
    num_inner_steps: int,
    options: Mapping[str, Any],
    *,
    learner: str,
    path: str,
    mask: Callable[[str], bool],
    start: StartFn = plain_start,
) -> MetaLearner:
    """Returns an `inner_loop` that adapts one part of the parameters, divided at a path.

    Args:
        loss_fn, optimizer, num_inner_steps, start: as in `inner_loop`.
        options: keyword arguments of `jaxmaml.maml`.
        learner: its name, for messages.
        path: some parameters must lie at this path, and some outside of it.
        mask: which parameters are adapted.

    Raises:
        TypeError: the options hold a mask, or one that does not exist.
    """
    settings = loop_options(learner, options, mask=mask)

    def checked_start(
        params: Params, learned: Mapping[str, Any], support: Batch, state: State
    ) -> Start:
        check_path(params, path)
        return start(params, learned, support, state)

    return inner_loop(loss_fn, optimizer, num_inner_steps, settings, start=checked_start)


def check_path(params: Params, path: str) -> None:
    """Raises ValueError unless some parameters lie at `path`, and some outside of it."""
    paths = trees.leaf_paths(params)
    inside = [trees.under_path(path)(leaf) for leaf in paths]
    if any(inside) and not all(inside):
        return
    found = "every parameter" if any(inside) else "no parameter"
    raise ValueError(f"{found} lies at {path!r}; the parameters are {', '.join(paths)}")
