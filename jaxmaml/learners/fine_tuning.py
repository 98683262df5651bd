"""The baseline that learns jointly and fine-tunes: Chen et al. 2019 (arXiv 1904.04232)."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from jaxmaml import inner
from jaxmaml.learners import heads
from jaxmaml.learners.heads import FeaturesFn
from jaxmaml.learners.inner_loop import Start, bare, inner_loop, learned
from jaxmaml.learners.reptile import joined
from jaxmaml.mixed_mode import check_scalar
from jaxmaml.types import (
    Array,
    AtStep,
    Batch,
    Extended,
    Info,
    LossFn,
    Mask,
    MetaLearner,
    MetaParams,
    Params,
)


class Classes(NamedTuple):
    """What joint pre-training of a classifier needs: episodes number their classes anew each time.

    Attributes:
        features_fn: `(params, batch) -> [num_examples, num_features]`, what a head is given.
        num_classes: training classes; batches have "classes" `[num_examples]`, 0..num_classes-1,
            such as those of `data.pools.sampler(..., classes=True)`.
        head: path of the episodes' head in the parameters.
    """

    features_fn: FeaturesFn
    num_classes: int
    head: str = "head"


def fine_tuning(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    classes: Classes | None = None,
    mask: Mask = None,
    at_step: AtStep = inner.fold_keys,
) -> MetaLearner:
    """Trains one model on the examples of all tasks, unadapted; fine-tunes it on a new task.

    Args:
        loss_fn, optimizer, num_inner_steps: of the fine-tuning, as in `jaxmaml.maml`.
        classes: None trains on `loss_fn` of support and query as one batch, which for regression is
            joint training (section 5.1 of the MAML paper). For a classifier, a softmax over all
            training classes is trained, on a linear head of its own, and the meta-parameters are
            `Extended(params, {"classes": that head})`; fine-tuning starts with the head in `params`.
        mask, at_step: as in `jaxmaml.maml`; with a mask, only a head is fine-tuned.

    Raises:
        ValueError: when called, for another learner's parameters, or batches without "classes".

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.fine_tuning(loss_fn, optax.sgd(0.5), 1)
        >>> task = jaxmaml.Task(support=jnp.zeros(4), query=jnp.ones(4))
        >>> float(jax.grad(learner.loss, has_aux=True)(jnp.array(0.0), task)[0])
        -0.5
    """
    if classes is None:
        train_on, of_model, init = loss_fn, bare, lambda params: params
    else:
        train_on = lambda meta_params, batch: _class_loss(classes, meta_params, batch)
        of_model = lambda meta_params: learned(meta_params, "classes")[0]
        init = lambda params: _with_class_head(classes, params)

    def start(meta_params, support, state):
        del support
        return Start(of_model(meta_params), optimizer, state)

    def loss(meta_params, task, *, step=0, state=()):
        del step
        of_model(meta_params)  # refuses another learner's
        value = train_on(meta_params, joined(task))
        check_scalar(value)
        return value, Info(value, jnp.zeros(0, value.dtype), state)

    learner = inner_loop(
        loss_fn, start, num_inner_steps, init=init, order="first", mask=mask, at_step=at_step
    )
    return learner._replace(loss=loss)


def _with_class_head(classes: Classes, params: Params) -> Extended:
    kernel = heads.get(params, classes.head)["kernel"]
    shape = (kernel.shape[0], classes.num_classes)
    new = {"kernel": jnp.zeros(shape, kernel.dtype), "bias": jnp.zeros(shape[1:], kernel.dtype)}
    return Extended(params, {"classes": new})


def _class_loss(classes: Classes, meta_params: MetaParams, batch: Batch) -> Array:
    params, head = learned(meta_params, "classes")
    if "classes" not in batch:
        raise ValueError(
            "joint pre-training needs the number of each example's class among all classes: batches "
            f"with 'classes', got {sorted(batch)}"
        )
    logits = classes.features_fn(params, batch) @ head["kernel"] + head["bias"][None]
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["classes"])
    return jnp.average(losses, weights=batch.get("weights"))
