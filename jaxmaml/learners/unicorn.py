"""UNICORN-MAML: Ye and Chao 2022 (arXiv 2106.16245), section 5."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxmaml.adjoints import Adjoint, FirstOrder
from jaxmaml.learners import heads
from jaxmaml.learners.hyperparams import Optimizer
from jaxmaml.learners.inner_loop import Start, inner_loop, loop_options
from jaxmaml.types import Array, Batch, LossFn, MetaLearner, Params, State

FIRST_ORDER = FirstOrder()


def unicorn(
    loss_fn: LossFn,
    optimizer: Optimizer,
    num_inner_steps: int,
    *,
    head: str = "head",
    way: int | None = None,
    adjoint: Adjoint = FIRST_ORDER,
    **options: Any,
) -> MetaLearner:
    """Returns MAML whose head starts with one learned vector, the same for every class.

    The result does not depend on how the classes of a task are numbered, and any number of ways
    works. Meta-parameters: `Extended(params, {"head": {"kernel": [num_features], "bias": []}})`, which
    start as the mean over the classes of the head; the head in `params` is not used.

    Under a softmax over the classes, what all of them share cancels, in the loss and in every
    gradient. With cross-entropy the meta-gradient of the shared vector is therefore zero: it never
    moves, and the learner equals `jaxmaml.maml` with a head that starts a task as zeros.
    It matters for losses other than a softmax.

    Args:
        loss_fn, optimizer, num_inner_steps: as in `jaxmaml.maml`. Learned rates should be per layer:
            those per parameter belong to the numbered outputs of the head.
        head: path of the head, a mapping with "kernel" and, in most models, "bias".
        way: number of classes. Defaults to that of the head.
        adjoint: as in `jaxmaml.maml`. Defaults to first order, as in the authors' code.
        options: other keyword arguments of `jaxmaml.maml`.

    Raises:
        ValueError: when called, if `head` is not a linear layer, or for the meta-parameters of
            another learner.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((batch @ params["head"]["kernel"]) ** 2)
        >>> learner = jaxmaml.unicorn(loss_fn, optax.sgd(0.1), 1)
        >>> params = {"head": {"kernel": jnp.array([[1.0, 3.0], [0.0, 2.0]])}}
        >>> learner.init(params).learned["head"]["kernel"].tolist()
        [2.0, 1.0]
    """

    def init(params: Params) -> dict[str, Array]:
        return {name: leaf.mean(-1) for name, leaf in heads.get(params, head).items()}

    def start(params: Params, learned: Mapping[str, Any], support: Batch, state: State) -> Start:
        del support
        number = heads.way_of(params, head, way)
        copies = {name: jnp.stack([x] * number, axis=-1) for name, x in learned["head"].items()}
        filled = heads.fill(params, head, copies["kernel"], copies.get("bias"))
        return Start(filled, state)

    return inner_loop(
        loss_fn, optimizer, num_inner_steps, loop_options("unicorn", {"adjoint": adjoint, **options}),
        start=start, init_learned={"head": init},
    )  # fmt: skip
