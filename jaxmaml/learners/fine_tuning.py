"""The baseline that trains jointly and fine-tunes: Chen et al. 2019 (arXiv 1904.04232)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmaml.adjoints import FirstOrder
from jaxmaml.learners import heads
from jaxmaml.learners.heads import FeaturesFn
from jaxmaml.learners.inner_loop import (
    LoopOptions,
    inner_loop,
    refuse_learned,
    reset_steps,
    split_learned,
)
from jaxmaml.learners.reptile import check_options, joined
from jaxmaml.mixed_mode import check_scalar
from jaxmaml.types import (
    Array,
    Batch,
    Info,
    LossFn,
    MetaLearner,
    MetaParams,
    Params,
    Scalar,
    State,
    Task,
    as_stateful,
    carries_state,
)


class TrainingClasses(NamedTuple):
    """The classes of joint training, which each episode numbers anew, and the features of a head.

    Attributes:
        features_fn: `(params, batch) -> [num_examples, num_features]`, the input of a head.
        num_classes: training classes; batches have "classes" `[num_examples]`, 0..num_classes-1,
            such as those of `data.pools.sampler(..., classes=True)`.
        head: path of the episodes' head in the parameters.

    Example:
        >>> import jaxmaml
        >>> jaxmaml.TrainingClasses(lambda params, batch: batch["inputs"], num_classes=64).head
        'head'
    """

    features_fn: FeaturesFn
    num_classes: int
    head: str = "head"


def fine_tuning(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    classes: TrainingClasses | None = None,
    **options: Any,
) -> MetaLearner:
    """Returns the baseline that trains one model on all tasks at once and fine-tunes it on a new one.

    Args:
        loss_fn, optimizer, num_inner_steps: of the fine-tuning, as in `jaxmaml.maml`.
        classes: None trains on `loss_fn` of support and query as one batch, which for regression is
            joint training (section 5.1 of the MAML paper). For a classifier, it trains a softmax over
            all training classes with a linear head of its own. The meta-parameters are then
            `Extended(params, {"classes": that head})`, and fine-tuning starts with the head in
            `params`.
        options: `mask` and `at_step`, as in `jaxmaml.maml`; a mask may fine-tune the head only.

    Raises:
        ValueError: the optimizer is a `LearnedOptimizer`, or a classifier carries state; when
            called, for the meta-parameters of another learner, or batches without "classes".
        TypeError: an option that has no meaning here, such as `adjoint`.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.fine_tuning(loss_fn, optax.sgd(0.5), 1)
        >>> task = jaxmaml.Task(support=jnp.zeros(4), query=jnp.ones(4))
        >>> float(jax.grad(learner.loss, has_aux=True)(jnp.array(0.0), task)[0])
        -0.5
    """
    refuse_learned(optimizer, "fine_tuning")
    check_options("fine_tuning", options)
    if classes is not None and carries_state(loss_fn):
        raise ValueError(
            "joint training of a classifier computes features without state: pass a loss whose model "
            "carries none, such as one with norm='transductive' or 'layer'"
        )
    init_learned = (
        {} if classes is None else {"classes": lambda params: _class_head(classes, params)}
    )

    def joint_loss(meta_params: MetaParams, batch: Batch, state: State) -> tuple[Any, State]:
        params, learned = split_learned(meta_params, tuple(init_learned))
        if classes is None:
            return as_stateful(loss_fn)(params, batch, state)
        return _class_loss(classes, params, learned["classes"], batch), state

    def loss(
        meta_params: MetaParams, task: Task, *, step: Scalar = 0, state: State = ()
    ) -> tuple[Array, Info]:
        del step
        value, state = joint_loss(meta_params, joined(task), reset_steps(state))
        check_scalar(value)
        return value, Info(value, jnp.zeros(0, value.dtype), state)

    loop_options = LoopOptions(adjoint=FirstOrder(), **options)
    learner = inner_loop(
        loss_fn, optimizer, num_inner_steps, loop_options, init_learned=init_learned
    )
    return learner._replace(loss=loss)


def _class_head(classes: TrainingClasses, params: Params) -> dict[str, Array]:
    """A linear head over all training classes, which starts as zeros."""
    kernel = heads.get(params, classes.head)["kernel"]
    shape = (kernel.shape[0], classes.num_classes)
    return {"kernel": jnp.zeros(shape, kernel.dtype), "bias": jnp.zeros(shape[1:], kernel.dtype)}


def _class_loss(
    classes: TrainingClasses, params: Params, head: dict[str, Array], batch: Batch
) -> Array:
    """Cross-entropy over all training classes."""
    if "classes" not in batch:
        raise ValueError(
            "joint training needs the index of each example's class among all training classes: a "
            f"batch with 'classes'; got {sorted(batch)}"
        )
    features = heads.features_of(classes.features_fn, params, batch)
    logits = features @ head["kernel"] + head["bias"][None]
    rows = heads.one_hot(batch, classes.num_classes, logits.dtype, name="classes")
    return -jnp.sum(rows * jax.nn.log_softmax(logits)) / jnp.sum(rows)
