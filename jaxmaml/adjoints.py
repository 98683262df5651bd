"""Adjoints: the way a meta-gradient is computed, as a value that is separate from the algorithm.

Every learner with an inner loop takes one of these as `adjoint`, and passes it on without looking
inside:

| adjoint | the meta-gradient |
|---|---|
| `Exact()` | the derivative of the meta-loss |
| `FirstOrder()` | the same, with the inner gradients as constants |
| `Implicit()` | the derivative at a minimum of the inner loss, however it was reached |
| `Annealed(before, after, at)` | one adjoint until an outer step, another one from then on |
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from jaxmaml import derivative_rules, mixed_mode, rewriting
from jaxmaml.checks import check_choice, check_count
from jaxmaml.types import Array, Scalar


class Stretch(NamedTuple):
    """Consecutive inner steps whose gradients are differentiated in the same way.

    Attributes:
        num_steps: how many inner steps.
        value_and_grad: a transformation of `(selected, *args) -> (loss, aux)`, like
            `jax.value_and_grad(..., has_aux=True)`.
        checkpoint_every: recompute the steps in segments of this length in the backward pass; None
            stores what each step needs.
        unroll: how many steps the body of the compiled loop holds.
    """

    num_steps: int
    value_and_grad: Callable[[Callable[..., Any]], Callable[..., Any]]
    checkpoint_every: int | None = None
    unroll: int = 1


class Adjoint:
    """The interface between an adjoint and the inner loop. Users pass one of its subclasses."""

    def stretches(self, num_inner_steps: int) -> tuple[Stretch, ...]:
        """Returns how the steps of an inner loop are differentiated, in order."""
        raise TypeError(f"{type(self).__name__} must define stretches")

    def attach(
        self,
        solve: Callable[[Any], tuple[Any, Any]],
        optimality_fn: Callable[[Any, Any], Any],
        start: Any,
    ) -> tuple[Any, Any]:
        """Returns `solve(start)` with the derivative of this adjoint.

        Args:
            solve: `(start) -> (solution, aux)`, the inner loop.
            optimality_fn: `(solution, aux) -> ` the gradient that is zero at a minimum.
            start: the starting point, with the structure of a solution.
        """
        del optimality_fn
        return solve(start)

    def seal(self, views: Any) -> Any:
        """Returns what was recorded along the loop, protected if it has no right derivative."""
        return views

    def at_outer_step(self, step: Scalar, function: Callable[..., Any], *operands: Any) -> Any:
        """Returns `function(adjoint, *operands)` with the adjoint of an outer step."""
        del step
        return function(self, *operands)

    def all(self) -> "tuple[Adjoint, ...]":
        """Returns every adjoint that some outer step uses."""
        return (self,)

    def after_training(self) -> "Adjoint":
        """Returns the adjoint that holds at the end of training, for use on new tasks."""
        return self


@dataclasses.dataclass(frozen=True)
class Exact(Adjoint):
    """Differentiates the meta-loss exactly, through all inner gradients or the last ones.

    Attributes:
        mode: how the inner gradients are differentiated. All modes give the same meta-gradient.
            "forward_over_reverse" and "checkpoint" store the parameters and the optimizer's state of
            every inner step, and its gradient if the update is not linear in it (Adam, not SGD).
            "reverse" stores the activations of every step. A loss with derivative rules that a user
            wrote (`jax.custom_vjp`, `jax.custom_jvp`) is differentiated as by "checkpoint" in place
            of the default, since such a rule need not be a derivative. Forward mode through the
            inner loop itself (`jax.jvp`, `jax.linearize`) needs "reverse" or "checkpoint". A single
            inner step in the default mode is differentiated in reverse mode, which computes no
            gradient twice.
        last: the number of inner steps that are exact, the last ones; the steps before them are
            first order (Shaban et al. 2019, arXiv 1810.10667). None for all.
        checkpoint_every: a number k stores the parameters and the optimizer's state of every k-th
            step and, during the backward pass, of k steps at a time, for one more pass over the
            inner loop. 1 saves the gradient of an inner Adam; about the square root of the number of
            inner steps needs the least memory. None stores those of every step.
        unroll: the number of inner steps in the body of the compiled loop, which is `jax.lax.scan`.
            The meta-gradient is the same. On a GPU or TPU, a number above 1 saves time where a step
            is so short that starting its kernels takes longer than running them, such as that of a
            small MLP: measure it there. The program and the time to compile it grow with it, and XLA
            may need more memory. A number above that of the inner steps writes all of them out, and
            one above `checkpoint_every` is refused.

    Raises:
        ValueError: an unknown mode, `last` below 0, `checkpoint_every` or `unroll` below 1, or
            `unroll` above `checkpoint_every`.

    Example:
        >>> import jaxmaml, optax
        >>> loss_fn = lambda params, batch: ((params - batch) ** 2).mean()
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 500, adjoint=jaxmaml.Exact(last=10))
    """

    mode: mixed_mode.Mode = "forward_over_reverse"
    last: int | None = None
    checkpoint_every: int | None = None
    unroll: int = 1

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(mixed_mode.Mode))
        if self.last is not None:
            check_count("last", self.last, minimum=0)
        _check_loop(self.checkpoint_every, self.unroll)

    def stretches(self, num_inner_steps: int) -> tuple[Stretch, ...]:
        """Returns the first-order steps, if any, and the exact ones."""
        num_exact = num_inner_steps if self.last is None else min(self.last, num_inner_steps)
        num_first = num_inner_steps - num_exact
        loop = self.checkpoint_every, self.unroll
        first = Stretch(num_first, _first_order, *loop)
        exact = Stretch(num_exact, self._gradient(num_inner_steps), *loop)
        if not num_first:
            return (exact,)
        return (first, exact) if num_exact else (first,)

    def _gradient(self, num_inner_steps: int) -> Callable[..., Any]:
        # The values of a single step are all there is to store, so none need be computed again.
        stores_little = num_inner_steps == 1 and self.checkpoint_every is None
        is_default = self.mode == "forward_over_reverse"
        mode: mixed_mode.Mode = "reverse" if stores_little and is_default else self.mode
        return lambda fun: mixed_mode.value_and_grad(fun, has_aux=True, mode=mode)


@dataclasses.dataclass(frozen=True)
class FirstOrder(Adjoint):
    """Treats the inner gradients as constants: FOMAML, Finn et al. 2017, section 5.2.

    Attributes:
        checkpoint_every: see `Exact`. It saves memory where the derivative of the inner optimizer
            itself needs it, such as that of an Adam over hundreds of steps.
        unroll: see `Exact`.

    Raises:
        ValueError: `checkpoint_every` or `unroll` is below 1, or `unroll` above `checkpoint_every`.

    Example:
        >>> import jaxmaml, optax
        >>> loss_fn = lambda params, batch: ((params - batch) ** 2).mean()
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 5, adjoint=jaxmaml.FirstOrder())
    """

    checkpoint_every: int | None = None
    unroll: int = 1

    def __post_init__(self) -> None:
        _check_loop(self.checkpoint_every, self.unroll)

    def stretches(self, num_inner_steps: int) -> tuple[Stretch, ...]:
        """Returns all steps, with constant gradients."""
        return (Stretch(num_inner_steps, _first_order, self.checkpoint_every, self.unroll),)


@dataclasses.dataclass(frozen=True)
class Implicit(Adjoint):
    """Differentiates a minimum of the inner loss, by the implicit function theorem.

    At a minimum phi of the inner loss G(phi, theta), d phi / d theta = -G_pp^-1 G_pt (Rajeswaran et
    al. 2019, arXiv 1909.04630, lemma 1). Conjugate gradients on Hessian-vector products solve the
    linear system. No inner step is differentiated, so that the memory does not grow with their
    number. The result is as accurate as phi is a minimum and the solver has converged:
    `diagnostics.cg_residual` measures both. The inner loss must depend on the initial parameters, as
    the proximal loss of `jaxmaml.imaml` does; otherwise their meta-gradient is zero. A loss with
    derivative rules that a user wrote is refused: its Hessian may not be symmetric.

    Attributes:
        num_cg_steps: the largest number of conjugate-gradient steps.
        cg_tol: the relative residual at which they stop.
        damping: a multiple of the identity that is added to the Hessian before it is inverted. It
            makes the system easier to solve and the meta-gradient inexact.
        unroll: the number of inner steps in the body of the compiled loop, see `Exact`.

    Raises:
        ValueError: `num_cg_steps` or `unroll` below 1, or `cg_tol` or `damping` negative or not
            finite.

    Example:
        >>> import jaxmaml, optax
        >>> loss_fn = lambda params, batch: ((params - batch) ** 2).mean()
        >>> learner = jaxmaml.imaml(loss_fn, optax.sgd(0.1), 16, num_cg_steps=10)
    """

    num_cg_steps: int = 5
    cg_tol: float = 1e-10
    damping: float = 0.0
    unroll: int = 1

    def __post_init__(self) -> None:
        check_count("num_cg_steps", self.num_cg_steps)
        check_count("unroll", self.unroll)
        for name in ("cg_tol", "damping"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number, 0 or more; got {value!r}")

    def stretches(self, num_inner_steps: int) -> tuple[Stretch, ...]:
        """Returns all steps, with constant gradients: none of them is differentiated."""
        return (Stretch(num_inner_steps, _refusing_rules_of_users, unroll=self.unroll),)

    def attach(
        self,
        solve: Callable[[Any], tuple[Any, Any]],
        optimality_fn: Callable[[Any, Any], Any],
        start: Any,
    ) -> tuple[Any, Any]:
        """Returns the solution with the derivative of a root of `optimality_fn`."""
        # The loop has constants only, so that none of its steps is differentiated.
        _, hoisted, captured = rewriting.hoist(solve, (start,))
        solution, aux = hoisted(*jax.lax.stop_gradient((start, captured)))

        # It ended at the root, with the state in which the gradient is zero there.
        at_root = lambda _, solution: solution
        optimality = lambda solution: optimality_fn(solution, aux)
        return jax.lax.custom_root(optimality, solution, at_root, self.solve_linear), aux

    def solve_linear(self, matrix: Callable[[Any], Any], rhs: Any) -> Any:
        """Returns x with `matrix(x) + damping * x = rhs`, by conjugate gradients.

        Args:
            matrix: a symmetric positive definite linear map of pytrees.
            rhs: a pytree.

        Example:
            >>> import jax.numpy as jnp
            >>> Implicit().solve_linear(lambda x: 2 * x, jnp.array([4.0])).tolist()
            [2.0]
        """

        def damped(x: Any) -> Any:
            return optax.tree.add(matrix(x), optax.tree.scale(self.damping, x))

        def solve(matrix: Callable[[Any], Any], rhs: Any) -> Any:
            return jax.scipy.sparse.linalg.cg(
                matrix, rhs, tol=self.cg_tol, maxiter=self.num_cg_steps
            )[0]

        return jax.lax.custom_linear_solve(
            damped if self.damping else matrix, rhs, solve, symmetric=True
        )

    def seal(self, views: Any) -> Any:
        """Returns the views, whose derivative is refused: the theorem holds at the end only."""
        return _without_derivative(views)


@dataclasses.dataclass(frozen=True)
class Annealed(Adjoint):
    """Uses one adjoint in the early outer steps and another one later.

    `Annealed(FirstOrder(), Exact(), at=s)` is the derivative-order annealing of MAML++ (Antoniou et
    al. 2019, arXiv 1810.09502, section 4). Both are compiled; each outer step runs one of them.

    Attributes:
        before: the adjoint of the outer steps 0..at-1.
        after: the adjoint of the later ones, and of new tasks.
        at: the first outer step of `after`, 0 or more.

    Raises:
        ValueError: `at` is negative.
        TypeError: `before` or `after` is not an adjoint without annealing.

    Example:
        >>> import jaxmaml, optax
        >>> loss_fn = lambda params, batch: ((params - batch) ** 2).mean()
        >>> adjoint = jaxmaml.Annealed(jaxmaml.FirstOrder(), jaxmaml.Exact(), at=25_000)
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 5, adjoint=adjoint)
    """

    before: Adjoint
    after: Adjoint
    at: int

    def __post_init__(self) -> None:
        check_count("at", self.at, minimum=0)
        for name in ("before", "after"):
            check_adjoint(getattr(self, name), name)
            if isinstance(getattr(self, name), Annealed):
                raise TypeError(f"{name} must not be annealed itself; got {getattr(self, name)!r}")

    def stretches(self, num_inner_steps: int) -> tuple[Stretch, ...]:
        """Raises ValueError: outside of a meta-loss, no outer step chooses between the two."""
        raise ValueError(
            "Annealed chooses by the outer step, which adapt and trace do not know: "
            "pass the adjoint that you want, `before` or `after`"
        )

    def at_outer_step(self, step: Scalar, function: Callable[..., Any], *operands: Any) -> Any:
        """Returns `function` with `before` or `after`."""
        before = lambda *operands: function(self.before, *operands)
        after = lambda *operands: function(self.after, *operands)
        if self.at == 0:
            return after(*operands)
        return jax.lax.cond(jnp.asarray(step) < self.at, before, after, *operands)

    def all(self) -> tuple[Adjoint, ...]:
        """Returns `before` and `after`."""
        return (self.before, self.after)

    def after_training(self) -> Adjoint:
        """Returns `after`."""
        return self.after


def check_adjoint(adjoint: Any, name: str = "adjoint") -> None:
    """Raises TypeError unless `adjoint` is an `Adjoint`.

    Example:
        >>> check_adjoint(Exact())
    """
    if not isinstance(adjoint, Adjoint):
        raise TypeError(
            f"{name} must be an adjoint such as jaxmaml.Exact() or jaxmaml.FirstOrder(); "
            f"got {adjoint!r}"
        )


def _check_loop(checkpoint_every: int | None, unroll: int) -> None:
    """Raises ValueError or TypeError unless segments and the steps of a body are counts that fit."""
    check_count("unroll", unroll)
    if checkpoint_every is None:
        return
    check_count("checkpoint_every", checkpoint_every)
    if unroll > checkpoint_every:
        raise ValueError(
            f"unroll must be at most checkpoint_every={checkpoint_every}, the number of steps of a "
            f"segment; got {unroll}"
        )


def _first_order(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Value and gradient as constants: no derivative passes."""
    plain = mixed_mode.value_and_grad(fun, has_aux=True, mode="reverse")
    return lambda *args: jax.lax.stop_gradient(plain(*jax.lax.stop_gradient(args)))


def _refusing_rules_of_users(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Constant gradients of a function whose gradient has a symmetric Jacobian."""
    constant = _first_order(fun)

    def checked(*args: Any) -> Any:
        found = derivative_rules.of_users(jax.make_jaxpr(fun)(*args).jaxpr)
        if found:
            raise TypeError(
                "Implicit() needs a loss function without derivative rules of its own (custom_vjp, "
                f"custom_jvp), since its Hessian may not be symmetric; it has {', '.join(found)}: "
                "use Exact()"
            )
        return constant(*args)

    return checked


@jax.custom_jvp
def _without_derivative(views: Any) -> Any:
    return views


@_without_derivative.defjvp
def _refuse(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Array, Array]:
    raise TypeError(
        "Implicit() has a derivative after the last inner step only: views along the inner loop "
        "(trace, query_weights) cannot be differentiated; use Exact() or FirstOrder()"
    )
