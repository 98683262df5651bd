"""Trust region policy optimization as an outer optimizer: MAML's for reinforcement learning."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxmaml import outer, parallel, trees
from jaxmaml.adjoints import Exact
from jaxmaml.batching import TASKS
from jaxmaml.checks import check_count
from jaxmaml.learners.inner_loop import algorithm_of, in_training
from jaxmaml.rl.baselines import masked_mean
from jaxmaml.rl.collecting import collect, counted, mean_returns
from jaxmaml.rl.problems import Experience, Problem
from jaxmaml.types import Array, Info, MetaLearner, MetaParams, MetaState, Scalar, State, Task

ACCEPTED = "accepted"
"""The metric that says whether an outer step was made."""


class TrpoState(NamedTuple):
    """The state of `trpo`.

    Attributes:
        num_rejected: the outer steps whose line search failed, int32 `[]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.bandit(3)
        >>> policy_fn, params = rl.policy(environment, hidden_sizes=(), rngs=nnx.Rngs(0))
        >>> int(rl.trpo(rl.Problem(environment, policy_fn)).init(params).num_rejected)
        0
    """

    num_rejected: Array


@dataclasses.dataclass(frozen=True)
class Trpo:
    """The outer optimizer that `trpo` returns; its arguments are the attributes.

    Example:
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.bandit(3)
        >>> policy_fn, _ = rl.policy(environment, hidden_sizes=(), rngs=nnx.Rngs(0))
        >>> rl.trpo(rl.Problem(environment, policy_fn)).max_kl
        0.01
    """

    problem: Problem
    max_kl: float
    num_cg_steps: int
    damping: float
    shrink: float
    num_line_search_steps: int

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics of `meta_step`."""
        return *outer.METRICS, *("kl", ACCEPTED, "return_before", "return")

    def init(self, params: MetaParams, /) -> TrpoState:
        """Returns the state before the first step."""
        del params
        return TrpoState(jnp.zeros((), jnp.int32))

    def meta_step(
        self, learner: MetaLearner, meta_state: MetaState, tasks: Task, /, **options: Any
    ) -> tuple[MetaState, dict[str, Array]]:
        """Samples, and makes one step; see `trpo`. The options are those of `jaxmaml.meta_step`."""
        _check_adjoint(learner)
        params, opt_state, step, state = meta_state
        tasks, parts = counted("trpo", tasks, options)
        batches = collect(self.problem, learner, params, tasks)
        grad = functools.partial(outer.meta_grad, step=step, state=state, **options)

        loss, grads, info = grad(learner, params, batches)
        args = params, state, batches, parts, grads
        direction, curvature = self._natural_direction(learner, options.get("mesh"), *args)

        # The longest step within the trust region, shortened until it is an improvement.
        kl_learner = learner._replace(loss=functools.partial(_kl_loss, self.problem, learner))
        longest = jnp.sqrt(2 * self.max_kl / jnp.maximum(curvature, jnp.finfo(loss.dtype).tiny))

        def candidate(number: Scalar) -> MetaParams:
            return optax.tree.add_scale(params, -longest * self.shrink**number, direction)

        def losses(number: Scalar) -> tuple[Array, Array]:
            at = candidate(number)
            return grad(learner, at, batches)[0], grad(kl_learner, at, batches)[0]

        number, accepted, kl = self._search(loss, losses)
        params = jax.tree.map(
            lambda new, old: jnp.where(accepted, new, old), candidate(number), params
        )
        rejected = opt_state.num_rejected + jnp.where(accepted, 0, 1)
        metrics = {
            "loss": loss, "query_loss": parts @ info.query_loss, "grad_norm": trees.norm(grads),
            "kl": jnp.where(accepted, kl, 0), ACCEPTED: accepted, **mean_returns(batches, parts),
        }  # fmt: skip
        return MetaState(params, TrpoState(rejected), step + 1, info.state), metrics

    def _natural_direction(
        self,
        learner: MetaLearner,
        mesh: Mesh | None,
        params: MetaParams,
        state: State,
        batches: Task,
        parts: Array,
        grads: MetaParams,
    ) -> tuple[MetaParams, Array]:
        """(inverse of the Fisher matrix times the meta-gradient, its product with the matrix)."""

        def solve(
            params: MetaParams, state: State, batches: Task, parts: Array, grads: MetaParams
        ) -> tuple[MetaParams, Array]:
            hessian = _kl_hessian(self.problem, learner, params, batches, state, parts)
            total = lambda tree: tree if mesh is None else jax.lax.psum(tree, TASKS)
            fisher = lambda vector: optax.tree.add_scale(
                total(hessian(vector)), self.damping, vector
            )
            direction = jax.scipy.sparse.linalg.cg(fisher, grads, maxiter=self.num_cg_steps)[0]
            return direction, jnp.asarray(optax.tree.vdot(direction, fisher(direction)))

        if mesh is None:
            return solve(params, state, batches, parts, grads)
        # Each device has the products of its own tasks, which are summed once per product.
        batches, parts = parallel.evened(batches, parts, mesh)
        shared, whole = PartitionSpec(TASKS), PartitionSpec()
        return jax.shard_map(
            solve, mesh=mesh, axis_names={TASKS}, check_vma=False,
            in_specs=(whole, whole, shared, shared, whole), out_specs=whole,
        )(params, state, batches, parts, grads)  # fmt: skip

    def _search(
        self, loss: Array, losses: Callable[[Scalar], tuple[Array, Array]]
    ) -> tuple[Array, Array, Array]:
        """(number of the first step that is accepted, whether one is, its divergence)."""

        def shorter(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            number = carry[0] + 1
            new_loss, kl = losses(number)
            return number, (new_loss < loss) & (kl <= self.max_kl), kl

        start = jnp.array(-1), jnp.array(False), jnp.zeros_like(loss)
        more = lambda carry: ~carry[1] & (carry[0] + 1 < self.num_line_search_steps)
        return jax.lax.while_loop(more, shorter, start)


def trpo(
    problem: Problem,
    *,
    max_kl: float = 0.01,
    num_cg_steps: int = 10,
    damping: float = 1e-5,
    shrink: float = 0.8,
    num_line_search_steps: int = 15,
) -> Trpo:
    """Returns trust region policy optimization, as the outer optimizer of a learner with `rl.losses`.

    Each outer step samples trajectories before and after adaptation, and holds them. It then minimizes
    the query loss under a bound on the divergence of the adapted policies (Schulman et al. 2015, arXiv
    1502.05477; Finn, Abbeel and Levine 2017, arXiv 1703.03400, section 5.3): conjugate gradients on
    products with the Hessian of the divergence, and a line search on the loss and the true divergence.
    If no step of the search is accepted, the parameters stay, and the state counts it.

    The Hessian of the divergence is a derivative of `adapt` in forward mode. Give the learner an adjoint
    that has one: `Exact(mode="reverse")` or `FirstOrder()`.

    Args:
        problem: that of the learner's losses.
        max_kl: the bound on the mean divergence.
        num_cg_steps: conjugate-gradient steps.
        damping: what is added to the Hessian.
        shrink: the factor between two steps of the line search, in 0..1.
        num_line_search_steps: the steps that are tried.

    Returns:
        An outer optimizer for `jaxmaml.fit` and `jaxmaml.init_state`. Its metrics are those of
        `jaxmaml.meta_step`, "kl", "accepted", and the mean undiscounted returns "return_before" and
        "return", before and after adaptation.

    Raises:
        TypeError: a count is not an integer; in an outer step, an adjoint without a derivative in
            forward mode.
        ValueError: a number is out of its range; in an outer step, a learner without an inner loop of
            jaxmaml.

    Example:
        >>> import jax, optax, jaxmaml
        >>> from flax import nnx
        >>> from jaxmaml import rl
        >>> environment = rl.navigation_2d()
        >>> policy_fn, params = rl.policy(environment, hidden_sizes=(8,), rngs=nnx.Rngs(0))
        >>> problem = rl.Problem(environment, policy_fn, num_trajectories=4, horizon=10)
        >>> parts, optimizer = rl.losses(problem), rl.trpo(problem)
        >>> learner = jaxmaml.maml(
        ...     parts.loss_fn,
        ...     optax.sgd(0.1),
        ...     1,
        ...     adjoint=jaxmaml.Exact(mode="reverse"),
        ...     query_loss_fn=parts.query_loss_fn,
        ...     at_step=parts.at_step,
        ... )
        >>> state = jaxmaml.init_state(learner, optimizer, params)
        >>> source = rl.sampler(environment, num_tasks=3)
        >>> *_, (state, metrics) = jaxmaml.fit(
        ...     learner, optimizer, state, source, 2, key=jax.random.key(0)
        ... )
        >>> bool((metrics["kl"] <= 0.01).all())
        True
    """
    check_count("num_cg_steps", num_cg_steps)
    check_count("num_line_search_steps", num_line_search_steps)
    if not max_kl > 0:
        raise ValueError(f"max_kl must be positive; got {max_kl!r}")
    if not damping >= 0:
        raise ValueError(f"damping must be 0 or more; got {damping!r}")
    if not 0 < shrink < 1:
        raise ValueError(f"shrink must be between 0 and 1; got {shrink!r}")
    return Trpo(problem, max_kl, num_cg_steps, damping, shrink, num_line_search_steps)


def _adapted_distribution(
    problem: Problem, learner: MetaLearner, meta_params: MetaParams, task: Task, state: State
) -> tuple[Any, Info]:
    """The actions of the adapted policy at the observations of the query."""
    adapted, info = in_training(learner).adapt(meta_params, task.support, state=state)
    return problem.policy_fn(adapted, task.query.observations), info


def _divergence(query: Experience, distribution: Any) -> Array:
    """The mean divergence of a distribution from the one that the query was sampled with."""
    return masked_mean(query.distribution.kl(distribution), query.mask)


def _kl_loss(
    problem: Problem,
    learner: MetaLearner,
    meta_params: MetaParams,
    task: Task,
    *,
    step: Scalar = 0,
    state: State = (),
) -> tuple[Array, Info]:
    """The divergence of the adapted policy from the one that the query was sampled with."""
    del step
    distribution, info = _adapted_distribution(problem, learner, meta_params, task, state)
    kl = _divergence(task.query, distribution)
    return kl, Info(kl, info.inner_losses, info.state)


def _check_adjoint(learner: MetaLearner) -> None:
    """Raises TypeError if the adaptation has no derivative in forward mode.

    JAX itself says so only when the program is compiled, without a place.
    """
    algorithm = algorithm_of(learner)
    # A single step has no custom derivative, unless it is checkpointed.
    is_custom = lambda adjoint: (
        adjoint.mode == "forward_over_reverse"
        and (algorithm.num_inner_steps > 1 or adjoint.checkpoint_every is not None)
    )
    exact = [adjoint for adjoint in algorithm.options.adjoint.all() if isinstance(adjoint, Exact)]
    if algorithm.num_inner_steps and any(map(is_custom, exact)):
        raise TypeError(
            "trpo differentiates the adaptation in forward mode: make the learner with "
            "adjoint=jaxmaml.Exact(mode='reverse')"
        )


def _kl_hessian(
    problem: Problem,
    learner: MetaLearner,
    meta_params: MetaParams,
    batches: Task,
    state: State,
    parts: Array,
) -> Callable[[MetaParams], MetaParams]:
    """Returns the product of a vector with the Hessian of the mean divergence.

    Where the batches were sampled, the divergence has no gradient, so that its Hessian is J^T M J: J is
    the derivative of the distributions by the meta-parameters, M the Hessian of the divergence by the
    distributions. This takes half of the arithmetic of a derivative of the gradient. What does not
    depend on the vector is computed once.
    """

    def distribution(meta_params: MetaParams, task: Task) -> Any:
        return _adapted_distribution(problem, learner, meta_params, task, state)[0]

    def mean_kl(distributions: Any) -> Array:
        return parts @ jax.vmap(_divergence)(batches.query, distributions)

    # One task after the other: on a CPU this is twice as fast as all at once.
    of_tasks = lambda params: jax.lax.map(functools.partial(distribution, params), batches)
    distributions, forward = jax.linearize(of_tasks, meta_params)
    backward = jax.linear_transpose(forward, meta_params)

    def product(vector: MetaParams) -> MetaParams:
        tangents = forward(vector)
        scaled = jax.jvp(jax.grad(mean_kl), (distributions,), (tangents,))[1]
        return backward(scaled)[0]

    return product
