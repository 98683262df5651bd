"""The inner loop of one task, over any optax optimizer."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmaml import inner_optimizers, mixed_mode, trees
from jaxmaml.adjoints import Adjoint, Exact, Stretch, check_adjoint
from jaxmaml.checks import check_count
from jaxmaml.types import (
    Array,
    AtStep,
    Batch,
    Info,
    LossFn,
    Mask,
    Params,
    Scalar,
    State,
    StatefulFn,
    View,
    as_stateful,
)

EXACT = Exact()
"""The adjoint of every function that takes one, by default."""

_RAW_KEY_SHAPES = ((2,), (4,))
"""The last axis of the data of a key, for the implementations that JAX has."""


def fold_keys(params: Params, batch: Batch, step: Scalar) -> tuple[Params, Batch]:
    """Folds the inner step into every typed PRNG-key leaf of the batch.

    This is the default of `at_step`: dropout, and any other noise whose key is in the batch, differs
    from step to step.

    Args:
        params: returned as they are.
        batch: any pytree.
        step: the inner step, 0 or more.

    Raises:
        TypeError: a leaf is a raw uint32 key, as `jax.random.PRNGKey` makes it. It cannot be told from
            data, so that it would be the same at every step.

    Example:
        >>> import jax, jaxmaml
        >>> batch = {"key": jax.random.key(0)}
        >>> _, folded = jaxmaml.fold_keys((), batch, 3)
        >>> bool(folded["key"] == jax.random.fold_in(batch["key"], 3))
        True
    """

    def fold(path: Any, leaf: Any) -> Any:
        dtype, shape = jnp.result_type(leaf), jnp.shape(leaf)
        if dtype == jnp.uint32 and shape[-1:] in _RAW_KEY_SHAPES:
            where = f"at {trees.leaf_path(path)!r} " if path else ""
            raise TypeError(
                f"the batch {where}holds uint32{list(shape)}, which looks like a raw PRNG key: make it "
                "a typed key with jax.random.wrap_key_data, or cast data to another type"
            )
        if not jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return leaf
        folded = jax.vmap(lambda key: jax.random.fold_in(key, step))(leaf.reshape(-1))
        return folded.reshape(leaf.shape)

    return params, jax.tree.map_with_path(fold, batch)


def adapt(
    loss_fn: LossFn,
    params: Params,
    support: Batch,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    adjoint: Adjoint = EXACT,
    mask: Mask = None,
    at_step: AtStep = fold_keys,
    state: State = (),
    opt_state: optax.OptState | None = None,
) -> tuple[Params, Info]:
    """Runs the inner loop of one task.

    theta_{i+1} = theta_i + update(grad loss(theta_i, support)): equation 1 of Finn et al. 2017 (arXiv
    1703.03400), with any optax optimizer, through whose state the derivative passes too.

    Args:
        loss_fn: `(params, batch) -> scalar mean loss`, or a loss that `jaxmaml.with_state` marks. The
            derivative also passes through the values that it closes over.
        params: pytree of floating-point arrays.
        support: pytree, leaves `[way * shot, ...]`.
        optimizer: any optax transformation that `jaxmaml.inner_optimizers` does not refuse.
        num_inner_steps: 0 or more; 0 returns the parameters as they are.
        adjoint: how the result is differentiated: `Exact`, `FirstOrder` or `Implicit`.
        mask: what to adapt: a pytree of bools like `params`, or a function of a leaf's path such as
            "head/kernel". None adapts everything. The optimizer sees `optax.MaskedNode` in place of
            the other leaves.
        at_step: `(params, batch, inner_step) -> (params, batch)`, called before each inner step with
            the steps 0..n-1, and with n on the parameters that are returned.
        state: the state of the loss function before the first step.
        opt_state: the state of the optimizer before the first step, such as `info.opt_state` of an
            earlier call, for an inner loop in several pieces. None starts it anew. The derivative
            passes through it, except under `Implicit`. The steps count from 0 in each piece.

    Returns:
        The adapted parameters, like `params`, and `Info(None, inner_losses [num_inner_steps], state,
        opt_state)`.

    Raises:
        ValueError: a negative number of steps, no parameters, a mask that matches nothing, an
            optimizer that cannot be used in an inner loop, or an `opt_state` of another optimizer.
        TypeError: parameters that are not floating-point, a loss that is not a floating-point scalar,
            or an `adjoint` that is not one.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
        >>> adapted, info = jaxmaml.adapt(loss_fn, jnp.array(0.0), jnp.ones(3), optax.sgd(0.25), 2)
        >>> float(adapted), info.inner_losses.tolist()
        (0.75, [1.0, 0.25])
    """
    steps = check_count("num_inner_steps", num_inner_steps, minimum=0)
    loop, start = make_loop(loss_fn, params, support, optimizer, adjoint, mask, at_step, opt_state)
    solve = lambda selected: loop.solve(selected, state, steps)
    optimality_fn = lambda selected, ended: loop.gradient(selected, ended[0], steps)
    selected, (state, losses, opt_state) = adjoint.attach(solve, optimality_fn, start)
    return loop.adapted(selected, steps), Info(None, losses, state, opt_state)


def trace(
    loss_fn: LossFn,
    params: Params,
    support: Batch,
    view: View,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    adjoint: Adjoint = EXACT,
    mask: Mask = None,
    at_step: AtStep = fold_keys,
    state: State = (),
) -> Any:
    """Returns `view` of the adapted parameters after 0, 1, .. n inner steps, from one pass.

    Args:
        view: `(adapted, state) -> pytree`. The parameters are those that `at_step` returns, so that
            the parts of a model that differ from step to step are the right ones.
        loss_fn, params, support, optimizer, num_inner_steps, adjoint, mask, at_step, state: see
            `adapt`.

    Returns:
        The views, leaves `[num_inner_steps + 1, ...]`.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
        >>> view = lambda adapted, state: adapted
        >>> jaxmaml.trace(loss_fn, jnp.array(0.0), jnp.ones(3), view, optax.sgd(0.25), 2).tolist()
        [0.0, 0.5, 0.75]
    """
    before = view(at_step(params, support, 0)[0], state)
    views, _ = record(
        loss_fn, params, support, view, optimizer, num_inner_steps,
        adjoint=adjoint, mask=mask, at_step=at_step, state=state,
    )  # fmt: skip
    join = lambda first, rest: jnp.concatenate([jnp.asarray(first)[None], rest])
    return jax.tree.map(join, before, views)


def record(
    loss_fn: LossFn,
    params: Params,
    support: Batch,
    view: View,
    optimizer: optax.GradientTransformation,
    num_inner_steps: int,
    *,
    adjoint: Adjoint,
    mask: Mask,
    at_step: AtStep,
    state: State,
) -> tuple[Any, Info]:
    """Returns the views after each of the steps 1..n, leaves `[n, ...]`, and an `Info`.

    `trace` is this with the view after no step in front. See `adapt` for the arguments.
    """
    steps = check_count("num_inner_steps", num_inner_steps, minimum=0)
    loop, start = make_loop(loss_fn, params, support, optimizer, adjoint, mask, at_step)
    _, state, _, losses, views = _run(loop, start, state, view, steps)
    return adjoint.seal(views), Info(None, losses, state)


class Loop(NamedTuple):
    """The values that stay the same along the inner loop of one task.

    Attributes:
        loss_fn: in its one form, `(params, batch, state) -> (loss, state)`.
        support: the batch.
        optimizer: the inner optimizer.
        adjoint: how the loop is differentiated.
        at_step: see `adapt`.
        frozen: the parameters that are not adapted, `optax.MaskedNode` in place of the others.
        opt_state: the state of the optimizer before the first step.
    """

    loss_fn: StatefulFn
    support: Batch
    optimizer: optax.GradientTransformationExtraArgs
    adjoint: Adjoint
    at_step: AtStep
    frozen: Params
    opt_state: optax.OptState

    def objective(
        self, selected: Params, frozen: Params, support: Batch, state: State, step: Scalar
    ) -> tuple[Array, State]:
        """(loss, state) of an inner step: a function of its arguments, which the adjoint stores."""
        params, batch = self.at_step(trees.combine(selected, frozen), support, step)
        out = self.loss_fn(params, batch, state)
        if isinstance(out, tuple) and len(out) == 2:
            _check_state(state, out[1])
        return out

    def adapted(self, selected: Params, step: Scalar) -> Params:
        """All parameters after a number of inner steps."""
        return self.at_step(trees.combine(selected, self.frozen), self.support, step)[0]

    def solve(
        self, selected: Params, state: State, num_inner_steps: int
    ) -> tuple[Params, tuple[State, Array, optax.OptState]]:
        """(the selected parameters after the loop, (state, inner losses, optimizer's state))."""
        no_view = lambda adapted, state: ()
        selected, state, opt_state, losses, _ = _run(
            self, selected, state, no_view, num_inner_steps
        )
        return selected, (state, losses, opt_state)

    def gradient(self, selected: Params, state: State, step: Scalar) -> Params:
        """The gradient of the support loss, which is zero at a minimum."""
        objective = lambda selected: self.objective(
            selected, self.frozen, self.support, state, step
        )
        return jax.grad(objective, has_aux=True)(selected)[0]


def _check_state(before: State, after: State) -> None:
    """Raises ValueError unless a loss returns a state like the one that it was given."""
    if not trees.has_types_of(after, before):
        kinds = [jax.tree.map(jnp.result_type, state) for state in (before, after)]
        raise ValueError(
            "the loss function must return a state of the structure and types of the one that it is "
            f"given; given {kinds[0]}, returned {kinds[1]}. Pass the initial state of the model to "
            "init_state, adapt or meta_grad"
        )


def make_loop(
    loss_fn: LossFn,
    params: Params,
    support: Batch,
    optimizer: optax.GradientTransformation,
    adjoint: Adjoint,
    mask: Mask,
    at_step: AtStep,
    opt_state: optax.OptState | None = None,
) -> tuple[Loop, Params]:
    """Returns the loop, and the parameters that it adapts, before the first step."""
    check_adjoint(adjoint)
    trees.check_params(params)
    selected, frozen = trees.partition(params, trees.is_adapted(params, mask))
    optimizer = optax.with_extra_args_support(optimizer)
    fresh = inner_optimizers.init(optimizer, selected)
    opt_state = fresh if opt_state is None else _checked_opt_state(fresh, opt_state)
    loss_fn = as_stateful(loss_fn)
    return Loop(loss_fn, support, optimizer, adjoint, at_step, frozen, opt_state), selected


def _checked_opt_state(fresh: optax.OptState, given: optax.OptState) -> optax.OptState:
    """Returns the given state; raises ValueError if the optimizer at hand has another kind of it."""
    if not trees.has_types_of(given, fresh, shapes=True):
        kinds = [jax.tree.map(trees.describe, tree) for tree in (fresh, given)]
        raise ValueError(
            "opt_state belongs to another optimizer or to other parameters: expected "
            f"{kinds[0]}, got {kinds[1]}"
        )
    return given


def _run(
    loop: Loop, selected: Params, state: State, view: View, num_inner_steps: int
) -> tuple[Params, State, optax.OptState, Array, Any]:
    """Runs the loop: (selected, state, optimizer's state, losses [n], views [n, ...])."""
    # The loop in stretches of steps that are differentiated alike, one after the other.
    carry = selected, loop.opt_state, state
    recorded, first = [], 0
    for stretch in loop.adjoint.stretches(num_inner_steps):
        step = functools.partial(_step, loop, view, stretch.value_and_grad(loop.objective))
        with mixed_mode.explain_forward_mode():
            carry, outputs = _scan(step, carry, first, stretch)
        recorded.append(outputs)
        first += stretch.num_steps

    # What they recorded, as one.
    losses, views = functools.reduce(_joined, recorded)
    selected, opt_state, state = carry
    return selected, state, opt_state, losses, views


def _step(loop: Loop, view: View, gradient: Callable[..., Any], carry: Any, i: Scalar) -> Any:
    """One inner step, as `jax.lax.scan` takes it."""
    selected, opt_state, state = carry
    objective = lambda selected: loop.objective(selected, loop.frozen, loop.support, state, i)[0]
    (loss, next_state), grads = gradient(selected, loop.frozen, loop.support, state, i)
    selected, opt_state = _update(loop.optimizer, grads, opt_state, selected, loss, objective)
    seen = view(loop.adapted(selected, i + 1), next_state)
    return (selected, opt_state, next_state), (loss, seen)


def _update(
    optimizer: optax.GradientTransformationExtraArgs,
    grads: Params,
    opt_state: optax.OptState,
    selected: Params,
    loss: Array,
    objective: Callable[[Params], Array],
) -> tuple[Params, optax.OptState]:
    """Makes one optimizer step; the backward pass stores only its arguments.

    Without the checkpoint it would also store the squares and roots of an Adam.
    """

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def update(grads: Params, opt_state: Any, selected: Params, loss: Array) -> Any:
        updates, opt_state = inner_optimizers.update(
            optimizer, grads, opt_state, selected, loss, objective
        )
        return optax.apply_updates(selected, updates), opt_state

    return update(grads, opt_state, selected, loss)


def _scan(
    step: Callable[[Any, Scalar], Any], carry: Any, first: int, stretch: Stretch
) -> tuple[Any, Any]:
    """`jax.lax.scan` over one stretch of steps, in segments that the backward pass recomputes."""
    num_steps, segment_size = stretch.num_steps, stretch.checkpoint_every
    scan = functools.partial(jax.lax.scan, step, unroll=stretch.unroll)

    # A single step needs no scan, whose carry XLA could not fuse with what surrounds it.
    if num_steps == 1 and segment_size is None:
        carry, output = step(carry, first)
        return carry, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], output)
    steps = jnp.arange(first, first + num_steps)
    if segment_size is None or segment_size >= num_steps:
        return scan(carry, steps)

    # A scan over whole segments, each of them a scan under a checkpoint; then the rest.
    num_whole = num_steps // segment_size * segment_size
    segment = jax.checkpoint(scan)
    carry, outputs = jax.lax.scan(segment, carry, steps[:num_whole].reshape(-1, segment_size))
    outputs = jax.tree.map(lambda leaf: leaf.reshape(num_whole, *leaf.shape[2:]), outputs)
    if num_whole == num_steps:
        return carry, outputs
    carry, rest = segment(carry, steps[num_whole:])
    return carry, _joined(outputs, rest)


def _joined(first: Any, rest: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, rest)
