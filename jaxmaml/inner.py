"""The inner loop of one task, over any optax optimiser."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmaml import mixed_mode
from jaxmaml.types import AtStep, Batch, Info, LossFn, Mask, Params, State

ORDERS = ("exact", "first")


def fold_keys(params: Params, batch: Batch, step: Any) -> tuple[Params, Batch]:
    """Folds the inner step into every typed PRNG-key leaf of the batch.

    The default of `at_step`: dropout, or any other noise whose key travels in the batch, differs
    from step to step.
    """

    def fold(leaf):
        if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            return leaf
        folded = jax.vmap(lambda key: jax.random.fold_in(key, step))(leaf.reshape(-1))
        return folded.reshape(leaf.shape)

    return params, jax.tree.map(fold, batch)


def adapt(
    loss_fn: LossFn,
    params: Params,
    support: Batch,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    order: str = "exact",
    adjoint: str = "forward_over_reverse",
    checkpoint_every: int | None = None,
    mask: Mask = None,
    at_step: AtStep = fold_keys,
    has_state: bool = False,
    state: State = (),
) -> tuple[Params, Info]:
    """Runs the inner loop of one task.

    theta_{i+1} = theta_i + update(grad loss(theta_i, support)), Finn et al. 2017 (arXiv 1703.03400),
    equation 1 with any optax optimiser, whose state is differentiated through too.

    Args:
        loss_fn: `(params, batch) -> scalar mean loss`, or with has_state
            `(params, batch, state) -> (loss, state)`. Values it closes over are differentiated too.
        params: pytree of floating-point arrays.
        support: pytree, leaves `[way*shot, ...]`.
        optimizer: any optax transformation. Adam and other square roots need `eps_root=1e-8`, or the
            exact gradient is NaN wherever an inner gradient is zero.
        num_inner_steps: 0 returns the parameters as they are.
        order: "exact" differentiates the inner gradients, "first" treats them as constants (FOMAML).
        adjoint: how an exact gradient is computed, see `mixed_mode.value_and_grad`.
            "forward_over_reverse" and "checkpoint" need memory for the parameters and the
            optimiser's state of every step, and for its gradient where the update is not linear in
            it (Adam, not SGD); "reverse" for the activations of every step. With one inner step and
            no `checkpoint_every` the first is the last, which computes no gradient twice. Forward
            mode through `adapt` itself (`jax.jvp`, `jax.linearize`) needs "reverse" or "checkpoint".
        checkpoint_every: None is as above; a number k keeps the parameters and the optimiser's state
            of every k-th step and, in the backward pass, of k steps at a time, for one more pass over
            the inner loop. 1 spares Adam's gradient; over hundreds of steps about the square root
            of num_inner_steps needs least memory.
        mask: what to adapt: a pytree of bools like `params`, or a function of a leaf's path such as
            "head/kernel"; None adapts all. The optimiser sees `optax.MaskedNode` in the other places.
        at_step: `(params, batch, step) -> (params, batch)`, called before each inner step with steps
            0..n-1, and with n on the parameters that are returned.
        has_state: whether `loss_fn` carries state.
        state: the state carried in.

    Returns:
        The adapted parameters, like `params`, and `Info(None, inner_losses [num_inner_steps], state)`.

    Raises:
        ValueError: an unknown order or adjoint, a negative number of steps, a mask that matches nothing.
        TypeError: a loss that is no floating-point scalar.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
        >>> adapted, info = jaxmaml.adapt(loss_fn, jnp.array(0.0), jnp.ones(3), optax.sgd(0.25), 2)
        >>> float(adapted), info.inner_losses.tolist()
        (0.75, [1.0, 0.25])
    """
    carry, inner_losses, _ = _run(
        loss_fn, params, support, _view_nothing, optimizer, num_inner_steps,
        order=order, adjoint=adjoint, checkpoint_every=checkpoint_every, mask=mask,
        at_step=at_step, has_state=has_state, state=state,
    )  # fmt: skip
    adapted, state = carry
    return adapted, Info(None, inner_losses, state)


def trace(
    loss_fn: LossFn,
    params: Params,
    support: Batch,
    view: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    order: str = "exact",
    adjoint: str = "forward_over_reverse",
    checkpoint_every: int | None = None,
    mask: Mask = None,
    at_step: AtStep = fold_keys,
    has_state: bool = False,
    state: State = (),
) -> Any:
    """`view` of the adapted parameters after 0, 1, .. n inner steps, in one pass.

    Args:
        view: `(adapted) -> pytree`, with has_state `(adapted, state) -> pytree`; the parameters are
            those that `at_step` answers, so that a model's per-step parts are the right ones.
        loss_fn, params, support, optimizer, num_inner_steps, order, adjoint, checkpoint_every,
            mask, at_step, has_state, state: see `adapt`.

    Returns:
        The views, leaves `[num_inner_steps + 1, ...]`.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
        >>> view = lambda adapted: adapted
        >>> jaxmaml.trace(loss_fn, jnp.array(0.0), jnp.ones(3), view, optax.sgd(0.25), 2).tolist()
        [0.0, 0.5, 0.75]
    """
    carry, _, views = _run(
        loss_fn, params, support, view, optimizer, num_inner_steps,
        order=order, adjoint=adjoint, checkpoint_every=checkpoint_every, mask=mask,
        at_step=at_step, has_state=has_state, state=state,
    )  # fmt: skip
    last = _call(view, *carry, has_state=has_state)
    return jax.tree.map(lambda before, end: jnp.append(before, end[None], axis=0), views, last)


def check_order(order: str) -> None:
    """Raises ValueError for an order that does not exist."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")


def check_checkpoint_every(checkpoint_every: int | None) -> None:
    """Raises ValueError unless `checkpoint_every` is None or a positive integer."""
    is_int = isinstance(checkpoint_every, int) and not isinstance(checkpoint_every, bool)
    if checkpoint_every is not None and (not is_int or checkpoint_every < 1):
        raise ValueError(
            f"checkpoint_every must be None or a positive integer; got {checkpoint_every!r}"
        )


def check_num_inner_steps(num_inner_steps: int) -> int:
    """The number as an int; ValueError where it is negative, TypeError where it is no integer."""
    try:
        number = operator.index(num_inner_steps)
    except TypeError:
        raise TypeError(f"num_inner_steps must be an integer; got {num_inner_steps!r}") from None
    if number < 0:
        raise ValueError(f"num_inner_steps must be 0 or more; got {number}")
    return number


def is_adapted(params: Params, mask: Mask) -> list[bool]:
    """What `mask` says of each leaf of `params`, in the order of `jax.tree.leaves`.

    Raises:
        ValueError: the mask matches no leaf, or its structure is not a prefix of the parameters'.
    """
    if callable(mask):
        paths = [path for path, _ in jax.tree.leaves_with_path(params)]
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
        flags = [bool(mask(name)) for name in names]
    else:
        flags = _broadcast(True if mask is None else mask, params)
    if flags and not any(flags):
        raise ValueError("mask matches no parameter: the inner loop would have nothing to adapt")
    return flags


def _broadcast(mask: Mask, params: Params) -> list[bool]:
    try:
        full = jax.tree.map(
            lambda flag, part: jax.tree.map(lambda _: bool(flag), part), mask, params
        )
    except ValueError as error:
        raise ValueError(f"mask must have the structure of the parameters: {error}") from None
    return jax.tree.leaves(full)


def _view_nothing(*_: Any) -> tuple[()]:
    return ()


def _call(function, params, *rest, has_state):
    """Leaves out the state, which is last, where the functions of the caller do not take it."""
    return function(params, *rest) if has_state else function(params, *rest[:-1])


def _scan(step, carry, num_steps, checkpoint_every):
    """`lax.scan` over the step numbers, in segments that are computed anew in the backward pass."""
    if num_steps == 1 and checkpoint_every is None:
        carry, output = step(carry, 0)
        return carry, jax.tree.map(lambda leaf: leaf[None], output)
    steps = jnp.arange(num_steps)
    if checkpoint_every is None or checkpoint_every >= num_steps:
        return jax.lax.scan(step, carry, steps)
    num_whole = num_steps // checkpoint_every * checkpoint_every
    segment = jax.checkpoint(lambda carry, steps: jax.lax.scan(step, carry, steps))
    segments = steps[:num_whole].reshape(-1, checkpoint_every)
    carry, outputs = jax.lax.scan(segment, carry, segments)
    outputs = jax.tree.map(lambda leaf: leaf.reshape(num_whole, *leaf.shape[2:]), outputs)
    if num_whole == num_steps:
        return carry, outputs
    carry, rest = segment(carry, steps[num_whole:])
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, rest)


def _gradient(objective, order, adjoint):
    mixed_mode.check_adjoint(adjoint)
    if order == "exact":
        return mixed_mode.value_and_grad(objective, has_aux=True, adjoint=adjoint)
    plain = mixed_mode.value_and_grad(objective, has_aux=True, adjoint="reverse")
    return lambda *args: jax.lax.stop_gradient(plain(*jax.lax.stop_gradient(args)))


def _run(
    loss_fn, params, support, view, optimizer, num_inner_steps, *,
    order, adjoint, checkpoint_every, mask, at_step, has_state, state,
):  # fmt: skip
    """The one inner loop: ((adapted, state), inner losses [n], views before each step [n, ...])."""
    num_inner_steps = check_num_inner_steps(num_inner_steps)
    check_order(order)
    check_checkpoint_every(checkpoint_every)
    flags = is_adapted(params, mask)
    leaves, treedef = jax.tree.flatten(params)
    optimizer = optax.with_extra_args_support(optimizer)
    frozen = [None if flag else leaf for flag, leaf in zip(flags, leaves, strict=True)]

    def whole(selected, frozen=frozen):
        return treedef.unflatten(mixed_mode.merge_leaves(flags, jax.tree.leaves(selected), frozen))

    def objective(selected, frozen, support, state, i):
        params, batch = at_step(whole(selected, frozen), support, i)
        out = _call(loss_fn, params, batch, state, has_state=has_state)
        return out if has_state else (out, state)

    def step(carry, i):
        selected, opt_state, state = carry
        seen = _call(view, at_step(whole(selected), support, i)[0], state, has_state=has_state)
        (loss, state), grads = gradient(selected, frozen, support, state, i)
        selected, opt_state = update(grads, opt_state, selected, loss)
        return (selected, opt_state, state), (loss, seen)

    # Kept of an update are its arguments only, not the squares and roots of an Adam between them.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def update(grads, opt_state, selected, loss):
        updates, opt_state = optimizer.update(grads, opt_state, selected, value=loss)
        return optax.apply_updates(selected, updates), opt_state

    # A single step's values are all there is to keep, and nothing need be computed again.
    keeps_values = num_inner_steps == 1 and checkpoint_every is None
    is_default = adjoint == "forward_over_reverse"
    gradient = _gradient(objective, order, "reverse" if keeps_values and is_default else adjoint)
    selected = treedef.unflatten(
        [leaf if flag else optax.MaskedNode() for flag, leaf in zip(flags, leaves, strict=True)]
    )
    carry = selected, optimizer.init(selected), state
    with mixed_mode.explain_forward_mode():
        carry, (losses, views) = _scan(step, carry, num_inner_steps, checkpoint_every)
    adapted = at_step(whole(carry[0]), support, num_inner_steps)[0]
    return (adapted, carry[2]), losses, views
