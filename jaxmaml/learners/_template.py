"""Copy this file to add a learner: NAME, AUTHORS YEAR (arXiv NUMBER)."""

from typing import Any

import optax

from jaxmaml.learners.inner_loop import Start, bare, inner_loop
from jaxmaml.types import LossFn, MetaLearner


def template(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    **options: Any,
) -> MetaLearner:
    """What it does in one sentence, with the equation of the paper: as it stands, MAML.

    Say where tasks start from: `start` is given the meta-parameters, the support and the state, and
    all that it computes is differentiated. A learner that learns more than parameters also passes
    `init=` and takes its own apart with `learned` (see unicorn.py); one without an inner loop is made
    by `head_filling` (protonet.py); one that is differentiated otherwise replaces `loss` (reptile.py).

    Then: export it in learners/__init__.py and jaxmaml/__init__.py, add a row to ROWS in
    tests/test_learners.py, and, for the command line, a line `Entry(_plain(jaxmaml.NAME))` to
    LEARNERS in train/family.py.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`.
        options: keyword arguments of `jaxmaml.maml`.
    """

    def start(meta_params, support, state):
        del support
        return Start(bare(meta_params), optimizer, state)

    return inner_loop(loss_fn, start, num_inner_steps, **options)
