"""Copy this file to add a learner: NAME, AUTHORS YEAR (arXiv NUMBER)."""

from collections.abc import Mapping
from typing import Any

from jaxmaml.learners.hyperparams import Optimizer
from jaxmaml.learners.inner_loop import Start, inner_loop, loop_options
from jaxmaml.types import Batch, LossFn, MetaLearner, Params, State


def template(
    loss_fn: LossFn, optimizer: Optimizer, num_inner_steps: int, **options: Any
) -> MetaLearner:
    """Returns one sentence about the learner, with the equation of the paper. As it stands, MAML.

    Say what a task starts from. `start` gets the initial parameters, what else the learner learns,
    the support and the state, and everything that it computes is differentiated. A learner that
    learns more than parameters also passes `init_learned` (unicorn.py). One that adds a term to the
    inner loss returns it as `Start.penalty` (imaml.py). One without an inner loop is made by
    `head_filling` (protonet.py). One that is differentiated in another way replaces `loss`
    (reptile.py). CONTRIBUTING.md says where to list the new file.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`.
        options: keyword arguments of `jaxmaml.maml`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = template(loss_fn, optax.sgd(0.5), 1)
        >>> adapted, _ = learner.adapt(jnp.array(0.0), jnp.ones(4))
        >>> float(adapted)
        0.5
    """

    def start(params: Params, learned: Mapping[str, Any], support: Batch, state: State) -> Start:
        del learned, support
        return Start(params, state)

    return inner_loop(
        loss_fn, optimizer, num_inner_steps, loop_options("template", options), start=start
    )
