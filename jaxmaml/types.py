"""The vocabulary: what a task is, what a loss is, and the four functions that make a meta-learner."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Array = jax.Array
Params = Any
"""A pytree of floating-point arrays: what is meta-learned."""
MetaParams = Any
"""What a meta-learner differentiates: `Params`, or `Extended` where the algorithm learns more."""
Batch = Any
"""A pytree of arrays. Built-in sources give {"inputs", "targets"} and, where examples are padded,
"weights" [num_examples]; the core takes any pytree."""
State = Any
"""What is carried but not differentiated, such as normalisation statistics; `()` for none."""
LossFn = Callable[..., Any]
"""(params, batch) -> scalar mean loss; with has_state=True (params, batch, state) -> (loss, state)."""
AtStep = Callable[[Params, Batch, Any], tuple[Params, Batch]]
"""(params, batch, inner step) -> (params, batch): called before each inner step."""
Mask = Any
"""What the inner loop adapts: a pytree of bools like the parameters, or a function of a leaf's path
("conv/0/kernel"); None adapts all."""


class Task(NamedTuple):
    """One task: adapt on `support`, score on `query`.

    `tasks`, in the plural, is a `Task` whose leaves have a leading task axis
    `[num_tasks, way*shot, ...]` and `[num_tasks, way*query, ...]`.
    """

    support: Batch
    query: Batch


class Extended(NamedTuple):
    """Meta-parameters of a learner that learns more than the initial parameters.

    Attributes:
        params: the model's initial parameters.
        learned: name -> pytree of what else is meta-learned, such as {"inner_lr": learning rates}.
    """

    params: Params
    learned: dict[str, Any]


class Info(NamedTuple):
    """What is reported beside a loss and never differentiated.

    Attributes:
        query_loss: the adapted model's mean loss on the query; `[num_tasks]` once batched.
        inner_losses: the support loss before each inner step; `[num_inner_steps]`, once batched
            `[num_tasks, num_inner_steps]`.
        state: what the loss function carried out; once batched, its mean over tasks.
    """

    query_loss: Any = None
    inner_losses: Any = None
    state: State = ()


class MetaState(NamedTuple):
    """All that an outer step reads and writes; a checkpoint is one of these."""

    params: MetaParams
    opt_state: Any
    step: Any
    state: State = ()


class MetaLearner(NamedTuple):
    """A meta-learning algorithm as four pure functions of one task.

    Attributes:
        init: `(params) -> meta_params`; Meta-SGD, for one, adds learning rates.
        adapt: `(meta_params, support, *, state=(), num_inner_steps=None) -> (adapted, info)`: what
            is run on a new task.
        trace: `(meta_params, support, view, *, state=(), num_inner_steps=None) -> views`: `view` of
            the adapted parameters after 0..n inner steps, leaves `[n+1, ...]`. A learner built with
            has_state=True calls `view(adapted, state)`, otherwise `view(adapted)`.
        loss: `(meta_params, task, *, step=0, state=()) -> (loss, info)`. Its gradient,
            `jax.grad(learner.loss, has_aux=True)`, is the meta-gradient.
    """

    init: Callable[[Params], MetaParams]
    adapt: Callable[..., tuple[Params, Info]]
    trace: Callable[..., Any]
    loss: Callable[..., tuple[Array, Info]]
