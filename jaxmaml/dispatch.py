"""Compiled dispatches: many outer steps of one program, or one step per batch from the host."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxmaml import batching, outer, parallel, sources, trees
from jaxmaml.batching import TASKS, ChunkSize
from jaxmaml.checks import check_choice
from jaxmaml.types import Array, MetaLearner, MetaState, OuterOptimizer, Sampler, Scalar, Task

Metrics: TypeAlias = dict[str, Any]
"""The metrics of `meta_step`, by name."""
OnNonFinite: TypeAlias = Literal["raise", "skip"]
"""The treatment of an outer step that is not finite."""
MAX_SKIPS = 100
"""The steps in a row that are not finite, of which the last one raises where the others are skipped."""
SKIPPED = "skipped"
"""The metric that says which steps were skipped, where steps are."""
MetaStep: TypeAlias = Callable[[MetaState, Task, Any], tuple[MetaState, Metrics]]
"""An outer step: `(meta_state, tasks, weights)`."""


class States(NamedTuple):
    """The states of a training.

    Attributes:
        good: the last state whose loss was finite.
        current: the state after the last step, whose loss is not known before the next step.
        num_skips: the steps that were skipped since the last one that was made, int32 `[]`.
    """

    good: MetaState
    current: MetaState
    num_skips: Any = np.int32(0)


class Compiled(NamedTuple):
    """A compiled dispatch; see `Program`."""

    run: Callable[[States, int], tuple[States, Metrics, Array]]
    seconds: float
    temp_bytes: int | None


def skips_allowed(on_nonfinite: OnNonFinite, num_outer_steps: int) -> int:
    """Returns the `max_skips` of `compile_program`; a training that skips all its steps must raise.

    Example:
        >>> skips_allowed("raise", 500), skips_allowed("skip", 500), skips_allowed("skip", 5)
        (0, 100, 5)
    """
    check_choice("on_nonfinite", on_nonfinite, ("raise", "skip"))
    return 0 if on_nonfinite == "raise" else min(MAX_SKIPS, num_outer_steps)


def compile_steps(
    meta_step: MetaStep,
    meta_state: MetaState,
    source: Any,
    key: Any,
    num_steps_per_dispatch: int,
    mesh: Mesh | None,
    max_skips: int = 0,
) -> Compiled:
    """One program of many outer steps that draws its tasks itself.

    The number of steps is an argument of the program: a shorter last dispatch compiles nothing. For
    `max_skips`, see `_guarded`.
    """
    is_pytree = sources.is_pytree(source)

    def dispatch(states: States, num_steps: Scalar, key: Array, arrays: Any) -> Any:
        draw = arrays if is_pytree else source

        # All keys at once: on a CPU, making one costs a tenth of a small network's step.
        steps = states.current.step + jnp.arange(num_steps_per_dispatch)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(steps)

        def step(states: States, number: Scalar) -> Any:
            tasks, weights = _drawn(draw, keys[number], mesh)
            return _guarded(meta_step, max_skips, states, tasks, weights)

        return _many_steps(step, states, num_steps, num_steps_per_dispatch)

    arrays = source if is_pytree else ()
    meta_state, key, arrays = placed((meta_state, key, arrays), mesh)
    states = placed(States(meta_state, meta_state), mesh)
    compiled, seconds, temp_bytes = _compile(dispatch, mesh, states, np.int32(1), key, arrays)
    run = lambda states, number: compiled(placed(states, mesh), np.int32(number), key, arrays)
    return Compiled(run, seconds, temp_bytes)


def _drawn(draw: Any, key: Array, mesh: Mesh | None) -> tuple[Task, Any]:
    """The tasks of a step, and their weights if devices were filled up with tasks without weight.

    Over a mesh, each device draws its own tasks, if the source can draw some of them.
    """
    if mesh is None or not isinstance(draw, Sampler):
        return draw(key), None
    per_device = -(-draw.num_tasks // mesh.shape[TASKS])

    # Its arrays are arguments, if it is a pytree of arrays.
    is_argument = sources.is_pytree(draw)

    def on_a_device(given: Any, key: Array) -> tuple[Task, Array]:
        sampler = given if is_argument else draw
        index = jax.lax.axis_index(TASKS) * per_device + jnp.arange(per_device)
        tasks = sampler.some(key, jnp.minimum(index, draw.num_tasks - 1))
        return tasks, (index < draw.num_tasks).astype(jnp.float32)

    shared, whole = PartitionSpec(TASKS), PartitionSpec()
    tasks, weights = jax.shard_map(
        on_a_device, mesh=mesh, axis_names={TASKS}, check_vma=False,
        in_specs=(whole, whole), out_specs=shared,
    )(draw if is_argument else (), key)  # fmt: skip
    return tasks, None if per_device * mesh.shape[TASKS] == draw.num_tasks else weights


def compile_batches(
    meta_step: MetaStep,
    meta_state: MetaState,
    batches: Iterator[Any],
    mesh: Mesh | None,
    max_skips: int = 0,
) -> Compiled:
    """A program of one outer step, for tasks that the host brings.

    The first batch is drawn for its shapes, and is that of the first step. The host waits for the
    device at the end of a dispatch only, so that it can read ahead. With several CPU devices it also
    waits before each step: concurrent programs can deadlock, since each waits for all devices in its
    all-reduce while it holds threads that the others need, and XLA ends the process after 40 seconds.
    For `max_skips`, see `_guarded`.
    """
    meta_state, first = placed(meta_state, mesh), _next_batch(batches, 0)
    shares = None if mesh is None else parallel.agree_on_shares(_num_tasks(first), mesh)
    spread = lambda tasks: (tasks, None) if mesh is None else parallel.spread(tasks, mesh, shares)
    states, alive = placed((States(meta_state, meta_state), jnp.array(True)), mesh)
    step = functools.partial(_guarded, meta_step, max_skips)
    compiled, seconds, temp_bytes = _compile(step, mesh, states, *spread(first), alive)
    later = _later_batches(batches, first, int(meta_state.step))
    drawn = map(spread, itertools.chain([first], later))
    one_at_a_time = mesh is not None and mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

    def run(states: States, num_steps: int) -> tuple[States, Metrics, Array]:
        rows, is_alive = [], alive
        for tasks, weights in itertools.islice(drawn, num_steps):
            if one_at_a_time:
                jax.block_until_ready(is_alive)
            states, metrics, is_alive = compiled(placed(states, mesh), tasks, weights, is_alive)
            rows.append((metrics, is_alive))
        metrics, oks = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(rows))
        return states, metrics, oks.sum()

    return Compiled(run, seconds, temp_bytes)


def _compile(
    function: Callable[..., Any], mesh: Mesh | None, states: States, *args: Any
) -> tuple[Any, float, int | None]:
    """(compiled program, seconds, bytes of temporary memory); its states stay where they are."""
    places = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, states)

    def stays(states: States, *args: Any) -> Any:
        states, *rest = function(states, *args)
        if places is not None:
            states = jax.lax.with_sharding_constraint(states, places)
        return states, *rest

    start = time.perf_counter()
    compiled = jax.jit(stays).lower(states, *args).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    return compiled, seconds, None if analysis is None else int(analysis.temp_size_in_bytes)


def make_meta_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation | OuterOptimizer,
    chunk_size: ChunkSize,
    mesh: Mesh | None,
    specs: Any = None,
) -> MetaStep:
    """An outer step on one device, or over a mesh of several, on which parameters may be split."""
    mesh, specs = (None, None) if mesh is None or mesh.size == 1 else (mesh, specs)
    if isinstance(optimizer, OuterOptimizer):
        step = functools.partial(optimizer.meta_step, learner)
    else:
        step = functools.partial(outer.meta_step, learner, optimizer)
    return lambda meta_state, tasks, weights: step(
        meta_state, tasks, weights=weights, chunk_size=chunk_size, mesh=mesh, specs=specs
    )


def placed(tree: Any, mesh: Mesh | None) -> Any:
    """Returns a pytree on a mesh, where what is split over it already stays so.

    Example:
        >>> len(placed(jnp.zeros(2), parallel.make_mesh(2)).devices())
        2
    """
    tree = jax.tree.map(jnp.asarray, tree)
    return tree if mesh is None else parallel.place(tree, mesh, parallel.specs_of(tree, mesh))


def _guarded(
    meta_step: MetaStep,
    max_skips: int,
    states: States,
    tasks: Task,
    weights: Any,
    alive: Any = True,
) -> tuple[States, Metrics, Array]:
    """An outer step that changes nothing from the first step that is not finite.

    If `max_skips` is positive, such a step is skipped, up to that number of steps in a row, of which
    the last one ends the training: only the step counter moves on, so that the next tasks are others.
    """
    # A state is good once its loss is finite; it is left once all that follows from it is, too.
    stepped, metrics = meta_step(states.current, tasks, weights)
    is_good = alive & jnp.isfinite(metrics["loss"])
    kept = jax.tree.map(_stays_finite, _carried(states.current), _carried(stepped))
    is_made = is_good & jnp.isfinite(metrics["grad_norm"]) & jax.tree.reduce(jnp.logical_and, kept)
    good = _where(is_good, states.current, states.good)
    if not max_skips:
        return States(good, _where(is_made, stepped, states.current)), metrics, is_made

    # Skip.
    is_skipped = alive & ~is_made & (states.num_skips + 1 < max_skips)
    step = jnp.where(is_skipped, stepped.step, states.current.step)
    current = _where(is_made, stepped, states.current._replace(step=step))
    num_skips = jnp.where(is_made, 0, states.num_skips + is_skipped)
    metrics = {**metrics, SKIPPED: is_skipped}
    return States(good, current, num_skips), metrics, is_made | is_skipped


def _carried(meta_state: MetaState) -> Any:
    """The floating-point parameters and state, which the next loss is computed from."""
    tree = meta_state.params, meta_state.state
    return trees.partition(tree, trees.is_float(tree))[0]


def _stays_finite(before: Array, after: Array) -> Array:
    """Whether no number that was finite has stopped to be: a state may hold an infinity on purpose."""
    return jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before))


def _where(condition: Array, first: MetaState, second: MetaState) -> MetaState:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)


def _many_steps(
    step: Callable[[States, Scalar], Any], states: States, num_steps: Scalar, most: int
) -> tuple[States, Metrics, Array]:
    """Steps until `num_steps` are done or one is not finite: (states, metrics [most], number done)."""
    _, shapes, _ = jax.eval_shape(step, states, 0)
    metrics = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), shapes)

    def body(carry: Any) -> Any:
        states, metrics, done, _ = carry
        states, row, ok = step(states, done)
        metrics = jax.tree.map(lambda rows, x: rows.at[done].set(x), metrics, row)
        return states, metrics, done + ok, ok

    start = states, metrics, jnp.zeros((), jnp.int32), jnp.array(True)
    unfinished = lambda carry: carry[3] & (carry[2] < num_steps)
    return jax.lax.while_loop(unfinished, body, start)[:3]


def _num_tasks(tasks: Task) -> int:
    return jax.tree.leaves(tasks)[0].shape[0]


def _next_batch(batches: Iterator[Any], num_drawn: int) -> Task:
    tasks = next(batches, None)
    if tasks is None:
        raise ValueError(
            f"source ended after {num_drawn} batches of tasks; every outer step needs one"
        )
    # A process may have no tasks of its own, if others have some.
    if jax.process_count() == 1 or _num_tasks(tasks):
        batching.check_tasks(tasks)
    return jax.tree.map(jnp.asarray, tasks)


def _later_batches(batches: Iterator[Any], first: Task, first_step: int) -> Iterator[Task]:
    """The tasks after those of the first step, which must be like them: one program serves all."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), first)
    for num_drawn in itertools.count(1):
        tasks = _next_batch(batches, num_drawn)
        if not trees.has_types_of(tasks, like, shapes=True):
            raise ValueError(
                f"the tasks of outer step {first_step + num_drawn} differ from those of the first: "
                f"{_difference(tasks, like)}; every step needs the same shapes and types (pad "
                "examples, with weights of zero)"
            )
        yield tasks


def _difference(tasks: Task, like: Task) -> str:
    """The first leaf that differs, by its path."""
    found, expected = (
        dict(zip(trees.leaf_paths(tree), map(trees.describe, jax.tree.leaves(tree)), strict=True))
        for tree in (tasks, like)
    )
    path = min((path for path, _ in found.items() ^ expected.items()), default="their structure")
    return f"{path} is {found.get(path, 'absent')}, and was {expected.get(path, 'absent')}"
