"""The works of `meta_rl.py` as jaxmaml computes them, each one compiled program."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import jaxmaml
from jaxmaml import dispatch, parallel, rl
from jaxmaml.rl import trust_region
from jaxmaml.types import Array, MetaLearner, MetaState, Params, Task

ADJOINTS = {"exact": jaxmaml.Exact(mode="reverse"), "first": jaxmaml.FirstOrder()}
INNER_LR, OUTER_LR = 0.1, 1e-3
SPREAD = ("rollouts", "adam-exact", "adam-first", "gradient-exact", "gradient-first")
"""The works whose tasks can be spread over devices."""
HOST_TRANSFER = re.compile(
    r' (?:infeed|outfeed|send|recv)\(|custom_call_target="[^"]*callback[^"]*"', re.IGNORECASE
)


class Sizes(NamedTuple):
    """The sizes of a meta-iteration."""

    num_tasks: int = 20
    num_trajectories: int = 20
    horizon: int = 100
    hidden_sizes: tuple[int, ...] = (100, 100)


QUICK = Sizes(num_tasks=4, num_trajectories=3, horizon=10, hidden_sizes=(8, 8))


class Setup(NamedTuple):
    """The work of both sides.

    Attributes:
        problem: what is sampled.
        params: the initial parameters.
        source: draws the tasks of a meta-iteration.
        trpo: the outer optimizer of "trpo-exact".
    """

    problem: rl.Problem
    params: Params
    source: rl.RequestSampler
    trpo: rl.Trpo

    def learner(self, order: str) -> MetaLearner:
        """Returns MAML of an order, with one inner step."""
        parts = rl.losses(self.problem)
        return jaxmaml.maml(
            parts.loss_fn, optax.sgd(INNER_LR), 1, adjoint=ADJOINTS[order],
            query_loss_fn=parts.query_loss_fn, at_step=parts.at_step,
        )  # fmt: skip

    def num_env_steps(self, work: str) -> int | None:
        """Returns the environment steps of a work; None if it has no rollouts."""
        problem, num_tasks = self.problem, self.source.num_tasks
        num_steps = num_tasks * problem.num_trajectories * problem.horizon
        if work.startswith(("gradient", "kl")):
            return None
        return num_steps if work == "rollouts" else 2 * num_steps


def make_setup(sizes: Sizes) -> Setup:
    """Returns the work at some sizes, always the same one."""
    environment = rl.navigation_2d()
    policy_fn, params = rl.policy(environment, hidden_sizes=sizes.hidden_sizes, rngs=nnx.Rngs(0))
    problem = rl.Problem(
        environment, policy_fn, num_trajectories=sizes.num_trajectories, horizon=sizes.horizon
    )
    source = rl.sampler(environment, num_tasks=sizes.num_tasks)
    return Setup(problem, params, source, rl.trpo(problem))


class Program(NamedTuple):
    """A work, compiled.

    Attributes:
        run: makes one call from where the last one ended, and blocks.
        text: the optimized program.
        num_devices: the devices over which tasks are spread.
    """

    run: Callable[[], None]
    text: str
    num_devices: int


def function_of(setup: Setup, work: str, mesh: Mesh) -> tuple[Callable[[Any], Any], Any]:
    """Returns (function, its argument) of a work: `state -> (next state, results)`."""
    order = "first" if work.endswith("first") else "exact"
    learner = setup.learner(order)
    if work in ("gradient-exact", "gradient-first", "kl-products"):
        return _part_on_batches(setup, learner, work, mesh)
    optimizer = setup.trpo if work == "trpo-exact" else optax.adam(OUTER_LR)
    start = jaxmaml.init_state(learner, optimizer, setup.params)
    make_step = dispatch.make_meta_step(learner, optimizer, "auto", mesh)

    def step(state: MetaState) -> tuple[MetaState, Any]:
        tasks = setup.source(jax.random.fold_in(jax.random.key(0), state.step))
        later = state._replace(step=state.step + 1)
        if work == "rollouts":
            return later, _rollouts(setup.problem, state.params, tasks.support, mesh)
        if work == "sampling":
            return later, rl.collect(setup.problem, learner, state.params, tasks)
        return make_step(state, tasks, None)

    return step, start


def _rollouts(problem: rl.Problem, params: Params, requests: rl.Request, mesh: Mesh) -> Any:
    """The trajectories of all tasks, each device those of its share of the tasks."""
    whole, shared = PartitionSpec(), PartitionSpec(*mesh.axis_names)
    sample = jax.vmap(problem.sample, (None, 0))
    if mesh.size == 1:
        return sample(params, requests)
    spread = jax.shard_map(
        sample, mesh=mesh, in_specs=(whole, shared), out_specs=shared, check_vma=False
    )
    return spread(params, requests)


def _part_on_batches(
    setup: Setup, learner: MetaLearner, work: str, mesh: Mesh
) -> tuple[Callable[[Any], Any], Any]:
    tasks = setup.source(jax.random.key(0))
    collect = functools.partial(rl.collect, setup.problem, learner)
    batches = jax.jit(collect)(setup.params, tasks)

    def part(state: tuple[Params, Task]) -> tuple[Any, Any]:
        params, batches = state
        if work == "kl-products":
            return state, _kl_products(setup, learner, params, batches)
        return state, jaxmaml.meta_grad(learner, params, batches, mesh=mesh)[:2]

    return part, (setup.params, batches)


def _kl_products(setup: Setup, learner: MetaLearner, params: Params, batches: Task) -> Params:
    """Multiplies by the Hessian as often as a step of TRPO, each time the normalized product before."""
    product = kl_product(setup, learner, params, batches)

    def again(_: Any, vector: Params) -> Params:
        image = product(vector)
        return optax.tree.scale(1 / optax.tree.norm(image), image)

    return jax.lax.fori_loop(0, setup.trpo.num_cg_steps + 1, again, params)


def kl_product(
    setup: Setup, learner: MetaLearner, params: Params, batches: Task
) -> Callable[[Params], Params]:
    """Returns the product of a vector with the Hessian of TRPO's divergence."""
    shares = jnp.full_like(batches.query.returns[:, 0], 1 / setup.source.num_tasks)
    return trust_region._kl_hessian(setup.problem, learner, params, batches, (), shares)


def compile_work(setup: Setup, work: str, num_devices: int) -> Program:
    """Compiles a work into one program.

    Raises:
        RuntimeError: the program exchanges something with the host while it runs.
    """
    mesh = parallel.make_mesh(num_devices)
    function, start = function_of(setup, work, mesh)
    state = parallel.place(start, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)

    def stays(state: Any) -> Any:
        state, results = function(state)
        return jax.lax.with_sharding_constraint(state, places), results

    compiled = jax.jit(stays).lower(state).compile()
    text = compiled.as_text() or ""
    if found := host_transfers(text):
        raise RuntimeError(f"the program of {work} exchanges data with the host: {found[0]}")

    def run() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state))

    return Program(run, text, num_devices)


def host_transfers(text: str) -> list[str]:
    """Returns the operations of an optimized program that exchange data with the host."""
    return [match.group().strip() for match in HOST_TRANSFER.finditer(text)]


class Reference(NamedTuple):
    """Our results, as NumPy arrays, to which those of PyTorch are compared.

    Attributes:
        goals: the tasks.
        batches: what was sampled, see `rl.collect`.
        grads: the meta-gradient of each order.
        product: that of the Hessian of TRPO's divergence with the exact meta-gradient.
        stepped: the parameters after a step of TRPO, in float64 only.
    """

    goals: Array
    batches: Task
    grads: dict[str, Params]
    product: Params
    stepped: Params


def reference(setup: Setup, dtype: Any) -> tuple[Params, Reference]:
    """Returns the parameters in a precision, and our results from there."""
    learners = {order: setup.learner(order) for order in ADJOINTS}
    exact = learners["exact"]

    def compute(params: Params) -> Reference:
        tasks = setup.source(jax.random.key(0))
        batches = rl.collect(setup.problem, exact, params, tasks)
        grads = {
            order: jaxmaml.meta_grad(learner, params, batches)[1]
            for order, learner in learners.items()
        }
        product = kl_product(setup, exact, params, batches)(grads["exact"])
        stepped = ()
        if dtype == np.float64:
            state = jaxmaml.init_state(exact, setup.trpo, params)
            stepped = setup.trpo.meta_step(exact, state, tasks)[0].params
        return Reference(tasks.support.task, batches, grads, product, stepped)

    params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), setup.params)
    with jax.enable_x64(dtype == np.float64):
        return params, jax.tree.map(np.asarray, jax.jit(compute)(params))
