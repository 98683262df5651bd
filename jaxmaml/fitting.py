"""The training loop: many outer steps per dispatch if the source can be traced."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxmaml import batching, diagnostics, outer, parallel, sources, trees
from jaxmaml.batching import ChunkSize
from jaxmaml.checks import check_count
from jaxmaml.sources import Source
from jaxmaml.types import Array, MetaLearner, MetaState, Scalar, Task

Metrics: TypeAlias = dict[str, Any]
"""The metrics of `meta_step`, by name."""
MetaStep: TypeAlias = Callable[[MetaState, Task], tuple[MetaState, Metrics]]

_OVERFLOW = (
    "made by a step whose loss and gradient are finite: the outer learning rate may be too large, or a "
    "statistic in the state overflows"
)

MAX_STEPS_PER_DISPATCH = 500
MIN_DISPATCHES = 12
"""The minimum number of dispatches, so that even a short run reports progress."""


class NonFiniteError(FloatingPointError):
    """Training met a loss, a meta-gradient or an update of the parameters that is not finite.

    Attributes:
        step: the outer step that failed, counted from 0.
        what: what was not finite, such as "loss is nan" or "the updated parameters or the state are
            not finite".
        cause: the first value that was not finite, in words; None if it is not known.
        meta_state: the last state whose loss was finite: the one before that step if its loss was, else
            the one before that. If the loss of the first step fails, it is the first state.
        metrics: the metrics since the last item that `fit` yielded, up to the failed step.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> learner = jaxmaml.maml(lambda params, batch: jnp.mean(params * batch), optax.sgd(0.1), 1)
        >>> optimizer = optax.sgd(0.1)
        >>> meta_state = jaxmaml.init_state(learner, optimizer, jnp.array(1.0))
        >>> bad = jaxmaml.Task(support=jnp.full((2, 3), jnp.nan), query=jnp.ones((2, 3)))
        >>> try:
        ...     list(jaxmaml.fit(learner, optimizer, meta_state, [bad], 1))
        ... except jaxmaml.NonFiniteError as error:
        ...     print(error.what, float(error.meta_state.params))
        loss is nan 1.0
    """

    def __init__(
        self, step: int, what: str, cause: str | None, meta_state: MetaState, metrics: Metrics
    ):
        self.step, self.what, self.cause = step, what, cause
        self.meta_state, self.metrics = meta_state, metrics
        first = f"; the first value that is not finite: {cause}" if cause else ""
        super().__init__(
            f"outer step {step}: {what}{first}. The attribute meta_state of this error holds the "
            "last good state"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = self.step, self.what, self.cause, self.meta_state, self.metrics
        return type(self), arguments


class States(NamedTuple):
    """The states of a training.

    Attributes:
        good: the last state whose loss was finite.
        current: the state after the last step, whose loss is not known before the next step.
    """

    good: MetaState
    current: MetaState


class Program(NamedTuple):
    """A compiled dispatch of outer steps.

    Attributes:
        run: `(states, num_steps) -> (states, metrics [num_steps_per_dispatch], num_done)`, where
            states are `States`; num_done is less than num_steps if a step was not finite.
        num_steps_per_dispatch: the largest number of steps that one call makes.
        compile_seconds: the time that tracing and compiling took.
        temp_bytes: XLA's temporary memory; None if the backend does not report it.
        diagnose: `(state) -> ` the first value that was not finite in the step from it, in words; None
            if that is not known.
    """

    run: Callable[[States, int], tuple[States, Metrics, Array]]
    num_steps_per_dispatch: int
    compile_seconds: float
    temp_bytes: int | None
    diagnose: Callable[[MetaState], str | None]


def fit(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    meta_state: MetaState,
    source: Source,
    num_outer_steps: int,
    *,
    key: Array | None = None,
    chunk_size: ChunkSize = "auto",
    num_steps_per_dispatch: int = 100,
    mesh: Mesh | None = None,
) -> Iterator[tuple[MetaState, Metrics]]:
    """Trains for `num_outer_steps` outer steps from `meta_state`.

    Args:
        learner: the meta-learner.
        optimizer: the outer optimizer that `meta_state` was made with.
        meta_state: see `jaxmaml.init_state`. If its step is 500, training resumes from there.
        source: a traceable function `key -> tasks`, called with `fold_in(key, step)` inside one
            compiled program of many outer steps; a stream, started at the step of `meta_state`; or
            any iterable of tasks (NumPy or JAX arrays of constant shape). A function with large
            arrays should be a `jax.tree_util.Partial` of them, so that they are an argument of the
            program and not part of it.
        num_outer_steps: the number of steps to make, at least one.
        key: typed PRNG key, for a function or a stream; None for an iterable.
        chunk_size: how many tasks are computed at once, see `jaxmaml.meta_grad`.
        num_steps_per_dispatch: steps between two items, and for a function between two visits of
            the host.
        mesh: the devices over which the tasks are spread, see `jaxmaml.parallel.task_mesh`. None
            uses one.

    Yields:
        (meta_state, metrics) after every `num_steps_per_dispatch` steps and after the last. The
        metrics of `jaxmaml.meta_step` are NumPy arrays `[steps since the last item]`.

    Raises:
        ValueError: no steps, a key that is missing or not wanted, or an iterable that ends too early.
        NonFiniteError: a loss, a meta-gradient, the updated parameters or the state are not finite.
            It carries the last good state.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 1)
        >>> optimizer = optax.adam(0.1)
        >>> meta_state = jaxmaml.init_state(learner, optimizer, jnp.array(0.0))
        >>> def source(key):
        ...     tasks = 3 + jax.random.normal(key, (8, 4))
        ...     return jaxmaml.Task(support=tasks, query=tasks)
        >>> for meta_state, metrics in jaxmaml.fit(
        ...     learner, optimizer, meta_state, source, 200, key=jax.random.key(0)
        ... ):
        ...     assert metrics["loss"].shape == (100,)
        >>> bool(abs(meta_state.params - 3) < 0.3)
        True
    """
    check_count("num_outer_steps", num_outer_steps)
    check_count("num_steps_per_dispatch", num_steps_per_dispatch)
    program = compile_program(
        learner, optimizer, meta_state, source,
        key=key, chunk_size=chunk_size, mesh=mesh,
        num_steps_per_dispatch=min(num_steps_per_dispatch, num_outer_steps),
    )  # fmt: skip
    return run_program(program, meta_state, num_outer_steps)


def compile_program(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    meta_state: MetaState,
    source: Source,
    *,
    key: Array | None = None,
    chunk_size: ChunkSize = "auto",
    num_steps_per_dispatch: int = 100,
    mesh: Mesh | None = None,
) -> Program:
    """Compiles a dispatch of up to `num_steps_per_dispatch` outer steps; see `fit`."""
    check_count("num_steps_per_dispatch", num_steps_per_dispatch)
    sources.check_key(source, key)
    meta_step = _meta_step(learner, optimizer, chunk_size, mesh)
    if sources.is_traceable(source):
        compiled = _compile_steps(meta_step, meta_state, source, key, num_steps_per_dispatch, mesh)
    else:
        batches = sources.batches(source, key, int(meta_state.step))
        compiled = _compile_batches(meta_step, meta_state, batches, mesh)
    return Program(
        run=compiled.run,
        num_steps_per_dispatch=num_steps_per_dispatch,
        compile_seconds=compiled.seconds,
        temp_bytes=compiled.temp_bytes,
        diagnose=functools.partial(_diagnose, learner, source, key),
    )


def run_program(
    program: Program, meta_state: MetaState, num_outer_steps: int
) -> Iterator[tuple[MetaState, Metrics]]:
    """Makes `num_outer_steps` steps with a compiled program; yields and raises as `fit` does."""
    check_count("num_outer_steps", num_outer_steps)
    states = States(meta_state, meta_state)
    while num_outer_steps > 0:
        num_steps = min(num_outer_steps, program.num_steps_per_dispatch)
        states, metrics, num_done = program.run(states, num_steps)
        metrics, num_done = jax.device_get(metrics), int(num_done)
        if num_done < num_steps:
            raise _error(program, states, metrics, num_done)
        yield states.current, {name: rows[:num_steps] for name, rows in metrics.items()}
        num_outer_steps -= num_steps


def steps_per_dispatch(num_outer_steps: int) -> int:
    """Returns the outer steps of one dispatch of a run: hundreds, but at least a dozen dispatches.

    Example:
        >>> steps_per_dispatch(60_000), steps_per_dispatch(600), steps_per_dispatch(5)
        (500, 50, 1)
    """
    return max(1, min(MAX_STEPS_PER_DISPATCH, num_outer_steps // MIN_DISPATCHES))


class _Compiled(NamedTuple):
    """A compiled dispatch; see `Program`."""

    run: Callable[[States, int], tuple[States, Metrics, Array]]
    seconds: float
    temp_bytes: int | None


def _compile_steps(
    meta_step: MetaStep,
    meta_state: MetaState,
    source: Any,
    key: Any,
    num_steps_per_dispatch: int,
    mesh: Mesh | None,
) -> _Compiled:
    """One program of many outer steps that draws its tasks itself.

    The number of steps is an argument of the program: a shorter last dispatch compiles nothing.
    """
    is_pytree = isinstance(source, jax.tree_util.Partial)

    def dispatch(states: States, num_steps: Scalar, key: Array, arrays: Any) -> Any:
        draw = arrays if is_pytree else source

        # All keys at once: on a CPU, making one costs a tenth of a small network's step.
        steps = states.current.step + jnp.arange(num_steps_per_dispatch)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(steps)

        def step(states: States, number: Scalar) -> Any:
            return _guarded(meta_step, states, draw(keys[number]))

        return _many_steps(step, states, num_steps, num_steps_per_dispatch)

    arrays = source if is_pytree else ()
    meta_state, key, arrays = _place((meta_state, key, arrays), mesh)
    states = States(meta_state, meta_state)
    compiled, seconds, temp_bytes = _compile(dispatch, states, np.int32(1), key, arrays)
    run = lambda states, number: compiled(_place(states, mesh), np.int32(number), key, arrays)
    return _Compiled(run, seconds, temp_bytes)


def _compile_batches(
    meta_step: MetaStep, meta_state: MetaState, batches: Iterator[Any], mesh: Mesh | None
) -> _Compiled:
    """A program of one outer step, for tasks that the host brings.

    The first batch is drawn for its shapes, and is that of the first step. The host waits for the
    device at the end of a dispatch only, so that it can read ahead. With several CPU devices it also
    waits before each step: concurrent programs can deadlock, since each waits for all devices in its
    all-reduce while it holds threads that the others need, and XLA ends the process after 40 seconds.
    """
    meta_state, first = _place(meta_state, mesh), _spread(_next_batch(batches, 0), mesh)
    step, states = functools.partial(_guarded, meta_step), States(meta_state, meta_state)
    compiled, seconds, temp_bytes = _compile(step, states, first, jnp.array(True))
    later = _later_batches(batches, _kinds(first), int(meta_state.step))
    drawn = itertools.chain([first], (_spread(tasks, mesh) for tasks in later))
    one_at_a_time = mesh is not None and mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

    def run(states: States, num_steps: int) -> tuple[States, Metrics, Array]:
        rows, alive = [], jnp.array(True)
        for tasks in itertools.islice(drawn, num_steps):
            if one_at_a_time:
                jax.block_until_ready(alive)
            states, metrics, alive = compiled(_place(states, mesh), tasks, alive)
            rows.append((metrics, alive))
        metrics, oks = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(rows))
        return states, metrics, oks.sum()

    return _Compiled(run, seconds, temp_bytes)


def _compile(function: Callable[..., Any], *args: Any) -> tuple[Any, float, int | None]:
    """(compiled program, seconds, bytes of temporary memory)."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    return compiled, seconds, None if analysis is None else int(analysis.temp_size_in_bytes)


def _meta_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    chunk_size: ChunkSize,
    mesh: Mesh | None,
) -> MetaStep:
    """An outer step on one device, or over a mesh of several."""
    if mesh is None or mesh.size == 1:
        return functools.partial(outer.meta_step, learner, optimizer, chunk_size=chunk_size)
    return functools.partial(
        parallel.meta_step, learner, optimizer, mesh=mesh, chunk_size=chunk_size
    )


def _place(tree: Any, mesh: Mesh | None) -> Any:
    tree = jax.tree.map(jnp.asarray, tree)
    return tree if mesh is None else parallel.replicate(tree, mesh)


def _spread(tasks: Task, mesh: Mesh | None) -> Task:
    tasks = jax.tree.map(jnp.asarray, tasks)
    return tasks if mesh is None else parallel.spread(tasks, mesh)


def _guarded(
    meta_step: MetaStep, states: States, tasks: Task, alive: Any = True
) -> tuple[States, Metrics, Array]:
    """An outer step that changes nothing from the first step that is not finite."""
    # A state is good once its loss is finite; it is left once all that follows from it is, too.
    stepped, metrics = meta_step(states.current, tasks)
    is_good = alive & jnp.isfinite(metrics["loss"])
    kept = jax.tree.map(_stays_finite, _carried(states.current), _carried(stepped))
    alive = is_good & jnp.isfinite(metrics["grad_norm"]) & jax.tree.reduce(jnp.logical_and, kept)
    good = _where(is_good, states.current, states.good)
    return States(good, _where(alive, stepped, states.current)), metrics, alive


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


def _next_batch(batches: Iterator[Any], num_drawn: int) -> Task:
    tasks = next(batches, None)
    if tasks is None:
        raise ValueError(
            f"source ended after {num_drawn} batches of tasks; every outer step needs one"
        )
    batching.check_tasks(tasks)
    return tasks


def _later_batches(
    batches: Iterator[Any], expected: dict[str, str], first_step: int
) -> Iterator[Task]:
    """The tasks after those of the first step, which must be like them: one program serves all."""
    for num_drawn in itertools.count(1):
        tasks = jax.tree.map(jnp.asarray, _next_batch(batches, num_drawn))
        found = _kinds(tasks)
        if found != expected:
            path = min(path for path, _ in found.items() ^ expected.items())
            raise ValueError(
                f"the tasks of outer step {first_step + num_drawn} differ from those of the first: "
                f"{path} is {found.get(path, 'absent')}, and was {expected.get(path, 'absent')}; "
                "every step needs the same shapes and types (pad examples, with weights of zero)"
            )
        yield tasks


def _kinds(tree: Any) -> dict[str, str]:
    """The type and shape of each leaf, by its path."""
    kind = lambda leaf: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
    return {
        path: kind(leaf)
        for path, leaf in zip(trees.leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    }


def _error(program: Program, states: States, metrics: Metrics, num_good: int) -> NonFiniteError:
    """The error of a dispatch that ended early, after `num_good` steps."""
    rows = {name: values[: num_good + 1] for name, values in metrics.items()}
    failed = [name for name in ("loss", "grad_norm") if not np.isfinite(rows[name][-1])]
    step = int(states.current.step)
    if not failed:
        what = "the updated parameters or the state are not finite"
        return NonFiniteError(step, what, _OVERFLOW, states.good, rows)
    try:
        cause = program.diagnose(states.current)
    except Exception as error:  # whatever goes wrong there, the last good state must not be lost
        cause = f"not known, since the search for it failed ({type(error).__name__}: {error})"
    return NonFiniteError(step, f"{failed[0]} is {rows[failed[0]][-1]}", cause, states.good, rows)


def _diagnose(
    learner: MetaLearner, source: Source, key: Array | None, meta_state: MetaState
) -> str | None:
    """The first value that is not finite in the step after a state, with the task; in words."""
    if key is None:
        return None  # an iterable does not give the tasks of a step again
    params, state = jax.device_get((meta_state.params, meta_state.state))
    step = int(meta_state.step)
    tasks = next(sources.batches(source, key, step))
    for i in range(batching.check_tasks(tasks)):
        task = jax.tree.map(lambda leaf: leaf[i], tasks)  # noqa: B023
        place = diagnostics.first_nonfinite(learner, params, task, step=step, state=state)
        if place is not None:
            return f"task {i}, {place}{_hint(place)}"
    return None


def _hint(place: str) -> str:
    """The usual reason for a gradient that is not finite under a finite loss."""
    if not place.startswith("meta-gradient"):
        return ""
    return (
        " (the loss is finite, so a derivative is not: a square root or a norm at zero in the loss or "
        "in what it calls)"
    )
