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
    num_exact_steps: int | None = None,
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
        num_exact_steps: with order="exact", only the last so many inner steps are exact, and those
            before them are first order; None is all.
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
            "head/kernel"; None adapts all, and so does one that is True everywhere. The
            optimiser sees `optax.MaskedNode` in the other places.
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
    carry, inner_losses, _ = run(
        loss_fn, params, support, _view_nothing, optimizer, num_inner_steps,
        order=order, num_exact_steps=num_exact_steps, adjoint=adjoint,
        checkpoint_every=checkpoint_every, mask=mask,
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
    num_exact_steps: int | None = None,
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
        loss_fn, params, support, optimizer, num_inner_steps, order, num_exact_steps, adjoint,
            checkpoint_every, mask, at_step, has_state, state: see `adapt`.

    Returns:
        The views, leaves `[num_inner_steps + 1, ...]`.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
        >>> view = lambda adapted: adapted
        >>> jaxmaml.trace(loss_fn, jnp.array(0.0), jnp.ones(3), view, optax.sgd(0.25), 2).tolist()
        [0.0, 0.5, 0.75]
    """
    before = _call(view, at_step(params, support, 0)[0], state, has_state=has_state)
    _, _, views = run(
        loss_fn, params, support, view, optimizer, num_inner_steps,
        order=order, num_exact_steps=num_exact_steps, adjoint=adjoint,
        checkpoint_every=checkpoint_every, mask=mask,
        at_step=at_step, has_state=has_state, state=state,
    )  # fmt: skip
    join = lambda first, rest: jnp.concatenate([jnp.asarray(first)[None], rest])
    return jax.tree.map(join, before, views)


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


def check_num_exact_steps(num_exact_steps: int | None) -> int:
    """The number as an int, None as 0; ValueError where it is negative or no integer."""
    is_int = isinstance(num_exact_steps, int) and not isinstance(num_exact_steps, bool)
    if num_exact_steps is not None and (not is_int or num_exact_steps < 0):
        raise ValueError(
            f"num_exact_steps must be None or an integer, 0 or more; got {num_exact_steps!r}"
        )
    return num_exact_steps or 0


def is_adapted(params: Params, mask: Mask) -> list[bool]:
    """What `mask` says of each leaf of `params`, in the order of `jax.tree.leaves`.

    Raises:
        ValueError: the mask matches no leaf, or its structure is not a prefix of the parameters'.
    """
    if not callable(mask):
        flags = _broadcast(True if mask is None else mask, params)
        _check_matches(flags, "it is False everywhere")
        return flags
    names = leaf_paths(params)
    flags = [bool(mask(name)) for name in names]
    _check_matches(flags, f"the parameters are {', '.join(names)}")
    return flags


def leaf_paths(params: Params) -> list[str]:
    """The path of each leaf as masks are given it, such as "conv/0/kernel"."""
    paths = [path for path, _ in jax.tree.leaves_with_path(params)]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]


def _check_matches(flags: list[bool], hint: str) -> None:
    if flags and not any(flags):
        raise ValueError(
            f"mask matches no parameter: the inner loop would have nothing to adapt; {hint}"
        )


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


def _scan(step, carry, first, last, checkpoint_every):
    """`lax.scan` over steps first..last-1, in segments computed anew in the backward pass."""
    num_steps = last - first
    if num_steps == 1 and checkpoint_every is None:
        carry, output = step(carry, first)
        return carry, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], output)
    steps = jnp.arange(first, last)
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
    return carry, _joined(outputs, rest)


def _joined(outputs, rest):
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outputs, rest)


def _gradient(objective, order, adjoint):
    mixed_mode.check_adjoint(adjoint)
    if order == "exact":
        return mixed_mode.value_and_grad(objective, has_aux=True, adjoint=adjoint)
    plain = mixed_mode.value_and_grad(objective, has_aux=True, adjoint="reverse")
    return lambda *args: jax.lax.stop_gradient(plain(*jax.lax.stop_gradient(args)))


def run(
    loss_fn, params, support, view, optimizer, num_inner_steps, *,
    order, num_exact_steps, adjoint, checkpoint_every, mask, at_step, has_state, state,
):  # fmt: skip
    """The one inner loop: ((adapted, state), inner losses [n], views after each step [n, ...]).

    `adapt` and `trace` are it with fewer arguments and fewer results.
    """
    num_inner_steps = check_num_inner_steps(num_inner_steps)
    check_order(order)
    check_checkpoint_every(checkpoint_every)
    num_exact = num_inner_steps if num_exact_steps is None else num_exact_steps
    num_exact = min(check_num_exact_steps(num_exact), num_inner_steps) if order == "exact" else 0
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

    def step(gradient, carry, i):
        selected, opt_state, state = carry
        (loss, state), grads = gradient(selected, frozen, support, state, i)
        selected, opt_state = update(grads, opt_state, selected, loss)
        adapted = at_step(whole(selected), support, i + 1)[0]
        seen = _call(view, adapted, state, has_state=has_state)
        return (selected, opt_state, state), (loss, seen)

    # Kept of an update are its arguments only, not the squares and roots of an Adam between them.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def update(grads, opt_state, selected, loss):
        updates, opt_state = optimizer.update(grads, opt_state, selected, value=loss)
        return optax.apply_updates(selected, updates), opt_state

    def steps(carry, first, last, order):
        # A single step's values are all there is to keep, and nothing need be computed again.
        keeps_values = num_inner_steps == 1 and checkpoint_every is None
        is_default = adjoint == "forward_over_reverse"
        gradient = _gradient(
            objective, order, "reverse" if keeps_values and is_default else adjoint
        )
        with mixed_mode.explain_forward_mode():
            return _scan(functools.partial(step, gradient), carry, first, last, checkpoint_every)

    selected = treedef.unflatten(
        [leaf if flag else optax.MaskedNode() for flag, leaf in zip(flags, leaves, strict=True)]
    )
    carry = selected, optimizer.init(selected), state
    num_first = num_inner_steps - num_exact
    if 0 < num_first < num_inner_steps:
        carry, early = steps(carry, 0, num_first, "first")
        carry, late = steps(carry, num_first, num_inner_steps, "exact")
        losses, views = _joined(early, late)
    else:
        order = "first" if num_first else "exact"
        carry, (losses, views) = steps(carry, 0, num_inner_steps, order)
    adapted = at_step(whole(carry[0]), support, num_inner_steps)[0]
    return (adapted, carry[2]), losses, views
