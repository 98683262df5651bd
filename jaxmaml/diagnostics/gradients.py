"""Agreement of one gradient with another, such as first order with exact."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmaml import trees
from jaxmaml.trees import by_layer
from jaxmaml.types import Array, MetaLearner, MetaParams, State, Task


def agreement(grads: Any, reference: Any) -> tuple[Array, Array]:
    """Returns how far a gradient agrees with a reference, over the whole tree.

    Args:
        grads: pytree, such as the first-order meta-gradient.
        reference: pytree of the same structure, such as the exact one.

    Returns:
        (cosine of the angle between them, norm of `grads` over norm of `reference`). A gradient of
        norm zero has no direction: the cosine is then NaN, and the ratio 0, inf or NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> cosine, ratio = agreement({"w": jnp.array([3.0, 0.0])}, {"w": jnp.array([1.0, 0.0])})
        >>> float(cosine), float(ratio)
        (1.0, 3.0)
    """
    grads, reference = trees.in_float32(grads), trees.in_float32(reference)
    norm, reference_norm = optax.tree.norm(grads), optax.tree.norm(reference)
    product = jnp.asarray(optax.tree.vdot(grads, reference))
    return product / (norm * reference_norm), jnp.asarray(norm / reference_norm)


def agreement_by_layer(
    grads: Any, reference: Any, *, depth: int | None = None
) -> dict[str, tuple[Array, Array]]:
    """Returns the `agreement` of each layer.

    Args:
        grads, reference: see `agreement`.
        depth: the number of components of a leaf's path ("conv/0/kernel") that make its layer.
            Defaults to all but the last, here "conv/0".

    Returns:
        {path of the layer: (cosine, norm ratio)}. A layer without a gradient, such as a bias before
        batch normalization, has a NaN cosine, or one that rounding decides.

    Raises:
        ValueError: the trees differ in structure, or the depth is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> grads = {"body": {"w": jnp.array([3.0, 0.0])}, "head": {"w": jnp.array([0.0, 1.0])}}
        >>> reference = {"body": {"w": jnp.array([1.0, 0.0])}, "head": {"w": jnp.array([1.0, 0.0])}}
        >>> found = agreement_by_layer(grads, reference)
        >>> {layer: (float(cosine), float(ratio)) for layer, (cosine, ratio) in found.items()}
        {'body': (1.0, 3.0), 'head': (0.0, 1.0)}
    """
    if jax.tree.structure(grads) != jax.tree.structure(reference):
        raise ValueError("grads and reference must be trees of the same structure")
    references = by_layer(reference, depth)
    layers = by_layer(grads, depth)
    return {layer: agreement(leaves, references[layer]) for layer, leaves in layers.items()}


def agreement_by_step(
    make: Callable[[int], MetaLearner],
    make_reference: Callable[[int], MetaLearner],
    meta_params: MetaParams,
    task: Task,
    numbers: Sequence[int],
    *,
    depth: int | None = None,
    state: State = (),
) -> tuple[tuple[Array, Array], dict[str, tuple[Array, Array]]]:
    """Returns how far the meta-gradients of two learners agree, by number of inner steps.

    `jax.vmap` over tasks gives the agreement on each task. For the agreement of the mean gradients,
    take `agreement` of two `jaxmaml.meta_grad`.

    Args:
        make: `(num_inner_steps) -> learner`, such as first-order MAML.
        make_reference: the same for the reference, such as exact MAML, with meta-parameters of the
            same structure.
        meta_params: where both gradients are taken.
        task: one task.
        numbers: the numbers of inner steps; each costs two gradients.
        depth: see `agreement_by_layer`.
        state: the state of the loss function.

    Returns:
        (result of `agreement`, result of `agreement_by_layer`), each leaf `[len(numbers)]`.

    Raises:
        ValueError: no numbers, or as in `agreement_by_layer`.

    Example:
        >>> import functools, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params["w"] - batch) ** 2) / 2
        >>> make = functools.partial(jaxmaml.maml, loss_fn, optax.sgd(0.5))
        >>> first = functools.partial(make, adjoint=jaxmaml.FirstOrder())
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> params = {"w": jnp.array(0.0)}
        >>> (cosine, ratio), by_layer = agreement_by_step(first, make, params, task, (0, 1, 2))
        >>> cosine.tolist(), ratio.tolist(), list(by_layer)
        ([1.0, 1.0, 1.0], [1.0, 2.0, 4.0], ['w'])
    """
    if len(numbers) == 0:
        raise ValueError("numbers must hold at least one number of inner steps")

    def gradient(learner: MetaLearner) -> MetaParams:
        return jax.grad(learner.loss, has_aux=True)(meta_params, task, state=state)[0]

    def compare(number: int) -> Any:
        grads, reference = gradient(make(number)), gradient(make_reference(number))
        return agreement(grads, reference), agreement_by_layer(grads, reference, depth=depth)

    return jax.tree.map(lambda *values: jnp.stack(values), *map(compare, numbers))
