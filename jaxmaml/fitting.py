"""The training loop: many outer steps per dispatch if the source can be traced."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxmaml import batching, diagnostics, dispatch, outer, parallel, processes, sources
from jaxmaml.batching import ChunkSize
from jaxmaml.checks import check_count
from jaxmaml.dispatch import SKIPPED, Metrics, OnNonFinite, States, skips_allowed
from jaxmaml.sources import Source
from jaxmaml.types import Array, MetaLearner, MetaState, OuterOptimizer

_OVERFLOW = (
    "made by a step whose loss and gradient are finite: the outer learning rate may be too large, or a "
    "statistic in the state overflows"
)

MAX_STEPS_PER_DISPATCH = 500
MIN_DISPATCHES = 12
"""The minimum number of dispatches, so that even a short run reports progress."""
SLICE_SECONDS = 1.0
"""The host looks at a dispatch about once in this time, so that it can be interrupted."""

_NUM_SKIPS = "num_skips"
"""The key of a checkpoint's record that `fit` keeps."""


class Checkpoints(Protocol):
    """Saves the states of a training, and restores one; see `jaxmaml.checkpoint.Manager`."""

    every: int | None

    def restore(self, like: Any) -> Any: ...
    def is_due(self, step: int) -> bool: ...
    def save(self, state: Any, *, record: Any = None) -> None: ...
    def wait(self) -> None: ...


class NonFiniteError(FloatingPointError):
    """Training met a loss, a meta-gradient or an update of the parameters that is not finite.

    Attributes:
        step: the outer step that failed, counted from 0.
        what: what was not finite, such as "loss is nan" or "the updated parameters or the state are
            not finite".
        cause: the first value that was not finite, in words; None if it is not known.
        meta_state: the last state whose loss was finite: the one before that step if its loss was, else
            the one before that. If the loss of the first step fails, it is the first state; with
            checkpoints that of the first step since the training was continued.
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
    optimizer: optax.GradientTransformation | OuterOptimizer,
    meta_state: MetaState,
    source: Source,
    num_outer_steps: int,
    *,
    key: Array | None = None,
    chunk_size: ChunkSize = "auto",
    num_steps_per_dispatch: int = 100,
    mesh: Mesh | None = None,
    checkpoints: Checkpoints | None = None,
    on_nonfinite: OnNonFinite = "raise",
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
        mesh: the devices over which the tasks are spread, see `jaxmaml.parallel.make_mesh`. None uses
            one. Put `meta_state` on it split, and it stays split, see `jaxmaml.parallel.split_specs`.
            With several processes, all of them call `fit` with the same arguments; an iterable gives
            each of them the tasks of its share, see `jaxmaml.parallel.share_of`.
        checkpoints: a `jaxmaml.checkpoint.Manager`. Training goes on with its newest checkpoint, as if
            it had never been interrupted: `meta_state`, an iterable and `num_outer_steps` are those of
            the start, and the steps that are done are left out. States are saved along the training
            and at its end.
        on_nonfinite: what happens to a step whose loss, meta-gradient, updated parameters or state are
            not finite. "raise" ends the training. "skip" leaves the parameters, the optimizer state and
            the state as they were, and goes on with the next step and its tasks; the metrics then have
            "skipped", bool. After 100 such steps in a row, or if all steps are, it raises too: such a
            training makes no progress.

    Yields:
        (meta_state, metrics) after every `num_steps_per_dispatch` steps and after the last. The
        metrics of `jaxmaml.meta_step` are NumPy arrays `[steps since the last item]`. If checkpoints
        say that all steps are done, the one item is the last state, with metrics of no steps.

    Raises:
        ValueError: no steps, a key that is missing or not wanted, an iterable that ends too early, or
            checkpoints of another model or configuration. A WriteError, which is one, says at the
            end that the last state cannot be saved.
        NonFiniteError: a loss, a meta-gradient, the updated parameters or the state are not finite,
            see `on_nonfinite`. It carries the last good state.

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
    if mesh is not None:
        parallel.check_mesh(mesh)
    max_skips = skips_allowed(on_nonfinite, num_outer_steps)
    first, start, num_skips = int(meta_state.step), dispatch.placed(meta_state, mesh), 0
    found = None if checkpoints is None else checkpoints.restore(start)
    if found is not None:
        start, num_skips = found.state, (found.record or {}).get(_NUM_SKIPS, 0)
    num_done = int(start.step) - first
    if num_done < 0:
        raise ValueError(
            f"the checkpoint of step {first + num_done} is before meta_state.step={first}"
        )
    if num_done >= num_outer_steps:
        return iter([(start, _no_metrics(optimizer, max_skips))])
    program = compile_program(
        learner, optimizer, start, sources.after(source, num_done),
        key=key, chunk_size=chunk_size, mesh=mesh,
        num_steps_per_dispatch=min(num_steps_per_dispatch, num_outer_steps), max_skips=max_skips,
    )  # fmt: skip
    return run_program(
        program, start, num_outer_steps - num_done, first, checkpoints, num_skips=num_skips
    )


def compile_program(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation | OuterOptimizer,
    meta_state: MetaState,
    source: Source,
    *,
    key: Array | None = None,
    chunk_size: ChunkSize = "auto",
    num_steps_per_dispatch: int = 100,
    mesh: Mesh | None = None,
    max_skips: int = 0,
) -> Program:
    """Compiles a dispatch of up to `num_steps_per_dispatch` outer steps; see `fit`.

    Up to `max_skips` steps in a row that are not finite are skipped, except for the last of them, which
    raises; see `dispatch.skips_allowed`.
    """
    check_count("num_steps_per_dispatch", num_steps_per_dispatch)
    sources.check_key(source, key)
    specs = None if mesh is None else parallel.specs_of(meta_state.params, mesh)
    meta_step = dispatch.make_meta_step(learner, optimizer, chunk_size, mesh, _if_split(specs))
    if sources.is_traceable(source):
        compiled = dispatch.compile_steps(
            meta_step, meta_state, source, key, num_steps_per_dispatch, mesh, max_skips
        )
    else:
        share = (0, 1) if mesh is None else parallel.share_of(mesh)
        batches = sources.batches(source, key, int(meta_state.step), share=share)
        compiled = dispatch.compile_batches(meta_step, meta_state, batches, mesh, max_skips)
    return Program(
        run=compiled.run,
        num_steps_per_dispatch=num_steps_per_dispatch,
        compile_seconds=compiled.seconds,
        temp_bytes=compiled.temp_bytes,
        diagnose=functools.partial(_diagnose, learner, source, key),
    )


def _if_split(specs: Any) -> Any:
    """Returns how parameters are split; None if none of them is."""
    is_spec = lambda value: isinstance(value, PartitionSpec)
    return specs if any(jax.tree.leaves(specs, is_leaf=is_spec)) else None


def run_program(
    program: Program,
    meta_state: MetaState,
    num_outer_steps: int,
    first_step: int | None = None,
    checkpoints: Checkpoints | None = None,
    *,
    num_skips: int = 0,
) -> Iterator[tuple[MetaState, Metrics]]:
    """Makes `num_outer_steps` steps with a compiled program; yields and raises as `fit` does.

    Args:
        program: the result of `compile_program`.
        meta_state: the state to start from.
        num_outer_steps: the number of steps to make.
        first_step: the step from which dispatches are counted; defaults to that of `meta_state`.
        checkpoints: where states are saved.
        num_skips: the steps that were skipped just before `meta_state`.
    """
    check_count("num_outer_steps", num_outer_steps)
    first_step = int(meta_state.step) if first_step is None else first_step
    every = getattr(checkpoints, "every", None)
    states = States(meta_state, meta_state, np.int32(num_skips))
    slices = run_slices(program, states, num_outer_steps, first_step=first_step, every=every)
    return _by_dispatch(_saved(slices, checkpoints), first_step, program.num_steps_per_dispatch)


def run_slices(
    program: Program,
    states: States,
    num_outer_steps: int,
    *,
    first_step: int = 0,
    every: int | None = None,
) -> Iterator[tuple[States, Metrics]]:
    """Makes the steps of `run_program`, and yields about once per second.

    A slice does not go beyond the end of a dispatch, and its states and metrics do not depend on where
    it ends: the program is the same, and the number of steps is its argument.

    Args:
        program: the result of `compile_program`.
        states: the states to start from.
        num_outer_steps: the number of steps to make.
        first_step: the step from which dispatches are counted.
        every: a slice ends at the multiples of this step, too.

    Yields:
        (states, metrics [steps of the slice]). From these states, the steps go on as they would have.

    Raises:
        NonFiniteError: as `fit` does, with the metrics of the slice.
    """
    step, size = int(states.current.step), 1
    last_step = step + num_outer_steps
    while step < last_step:
        # Up to the next end.
        most = program.num_steps_per_dispatch
        ends = [last_step - step, most - (step - first_step) % most]
        if every is not None:
            ends.append(every - step % every)
        num_steps = min(size, *ends)

        # Make the steps. The size of the next slice follows from their time, that of process 0 where
        # there are several.
        start = time.perf_counter()
        states, metrics, num_done = program.run(states, num_steps)
        metrics, num_done = jax.device_get(metrics), int(num_done)
        if num_done < num_steps:
            raise _error(program, states, metrics, num_done)
        seconds = (time.perf_counter() - start) / num_steps
        size = processes.first(max(1, min(10 * size, int(SLICE_SECONDS / seconds))))
        step += num_steps
        yield states, {name: rows[:num_steps] for name, rows in metrics.items()}


def _saved(
    slices: Iterator[tuple[States, Metrics]], checkpoints: Checkpoints | None
) -> Iterator[tuple[MetaState, Metrics]]:
    """Yields the current state of each slice, and saves it where this is due, and the last one."""
    if checkpoints is None:
        yield from ((states.current, metrics) for states, metrics in slices)
        return
    meta_state, record, is_saved = None, None, True
    for states, metrics in slices:
        meta_state, num_skips = states.current, int(states.num_skips)
        record = {_NUM_SKIPS: num_skips} if num_skips else None
        is_saved = checkpoints.is_due(int(meta_state.step))
        if is_saved:
            checkpoints.save(meta_state, record=record)
        yield meta_state, metrics
    if not is_saved:
        checkpoints.save(meta_state, record=record)
    checkpoints.wait()


def _by_dispatch(
    slices: Iterator[tuple[MetaState, Metrics]], first_step: int, num_steps_per_dispatch: int
) -> Iterator[tuple[MetaState, Metrics]]:
    """Yields the last state and all metrics of each dispatch."""
    kept: list[tuple[MetaState, Metrics]] = []
    try:
        for meta_state, metrics in slices:
            kept.append((meta_state, metrics))
            if (int(meta_state.step) - first_step) % num_steps_per_dispatch == 0:
                yield meta_state, _joined(kept)
                kept = []
    except NonFiniteError as error:
        error.metrics = _joined([*kept, (error.meta_state, error.metrics)])
        raise
    if kept:
        yield kept[-1][0], _joined(kept)


def _joined(parts: list[tuple[MetaState, Metrics]]) -> Metrics:
    """Returns the metrics of some slices, one after the other."""
    names = parts[0][1]
    return {name: np.concatenate([metrics[name] for _, metrics in parts]) for name in names}


def _no_metrics(
    optimizer: optax.GradientTransformation | OuterOptimizer, max_skips: int
) -> Metrics:
    """Returns the metrics of no steps."""
    names = optimizer.metrics if isinstance(optimizer, OuterOptimizer) else outer.METRICS
    skipped = {SKIPPED: np.zeros(0, bool)} if max_skips else {}
    return {**{name: np.zeros(0, np.float32) for name in names}, **skipped}


def steps_per_dispatch(num_outer_steps: int) -> int:
    """Returns the outer steps of one dispatch of a run: hundreds, but at least a dozen dispatches.

    Example:
        >>> steps_per_dispatch(60_000), steps_per_dispatch(600), steps_per_dispatch(5)
        (500, 50, 1)
    """
    return max(1, min(MAX_STEPS_PER_DISPATCH, num_outer_steps // MIN_DISPATCHES))


def _error(program: Program, states: States, metrics: Metrics, num_good: int) -> NonFiniteError:
    """The error of a dispatch that ended early, after `num_good` steps."""
    rows = {name: values[: num_good + 1] for name, values in metrics.items()}
    failed = [name for name in ("loss", "grad_norm") if not np.isfinite(rows[name][-1])]
    step, num_skips = int(states.current.step), int(states.num_skips)
    before = f", and the {num_skips} steps before it were skipped" if num_skips else ""
    if not failed:
        what = f"the updated parameters or the state are not finite{before}"
        return NonFiniteError(step, what, _OVERFLOW, states.good, rows)
    try:
        cause = program.diagnose(states.current)
    except Exception as error:  # whatever goes wrong there, the last good state must not be lost
        cause = f"not known, since the search for it failed ({type(error).__name__}: {error})"
    what = f"{failed[0]} is {rows[failed[0]][-1]}{before}"
    return NonFiniteError(step, what, cause, states.good, rows)


def _diagnose(
    learner: MetaLearner, source: Source, key: Array | None, meta_state: MetaState
) -> str | None:
    """The first value that is not finite in the step after a state, with the task; in words."""
    if key is None:
        return None  # an iterable does not give the tasks of a step again
    params, state = parallel.to_host((meta_state.params, meta_state.state))
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
