"""The training loop: many outer steps a dispatch where the source can be traced."""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxmaml import outer, parallel
from jaxmaml.types import Array, MetaLearner, MetaState, Task

Metrics = dict[str, Any]
Source = Callable[[Array], Any] | Iterable[Any]  # of tasks

MAX_STEPS_PER_DISPATCH = 500
MIN_DISPATCHES = 12
"""So many points at least where a run can be looked at, however short it is."""


class Program(NamedTuple):
    """A compiled dispatch of outer steps.

    Attributes:
        run: `(meta_state, number of steps) -> (meta_state, metrics [num_steps_per_dispatch],
            steps done)`; steps done is less than asked where a step was not finite.
        num_steps_per_dispatch: the most steps that one call makes.
        compile_seconds: what tracing and compiling took.
        temp_bytes: XLA's temporary memory; None where the backend does not tell.
    """

    run: Callable[[MetaState, int], tuple[MetaState, Metrics, Array]]
    num_steps_per_dispatch: int
    compile_seconds: float
    temp_bytes: int | None


def fit(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    meta_state: MetaState,
    source: Source,
    num_outer_steps: int,
    *,
    key: Array | None = None,
    chunk_size: int | str | None = "auto",
    num_steps_per_dispatch: int = 100,
    mesh: Mesh | None = None,
) -> Iterator[tuple[MetaState, Metrics]]:
    """Trains for `num_outer_steps` outer steps from `meta_state`.

    Args:
        learner: the meta-learner.
        optimizer: the outer optimiser that `meta_state` was made with.
        meta_state: see `jaxmaml.init_state`; where it says step 500, training goes on from there.
        source: either a traceable function `key -> tasks`, called with `fold_in(key, step)` inside
            one compiled program of many outer steps, or any iterable of tasks (NumPy or JAX arrays
            of constant shape). A function with large arrays is best a `jax.tree_util.Partial` of
            them, so that they are an argument of the program and not a part of it.
        num_outer_steps: how many steps to make, at least one.
        key: typed PRNG key, for a function; not for an iterable.
        chunk_size: how many tasks are computed at once, see `jaxmaml.meta_grad`.
        num_steps_per_dispatch: steps between two items, and for a function between two visits of
            the host.
        mesh: the devices to spread the tasks over, see `jaxmaml.parallel.task_mesh`; None is one.

    Yields:
        (meta_state, metrics) after every `num_steps_per_dispatch` steps and after the last. The
        metrics of `jaxmaml.meta_step` are NumPy arrays `[steps since the last item]`. Where a loss or
        a gradient is not finite, training stops: the last item holds the last good state,
        metrics["stopped_at"] the outer step that failed, counted from 0, and
        metrics["stopped_because"] what was not finite; the arrays end with the failed step.

    Raises:
        ValueError: no steps, no key for a function or a key for an iterable, or an iterable that ends
            too early.

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
    if callable(source):
        if key is None:
            raise ValueError("key must be given where source is a function of it")
        program = compile_steps(
            learner, optimizer, meta_state, source,
            key=key, chunk_size=chunk_size,
            num_steps_per_dispatch=min(num_steps_per_dispatch, num_outer_steps), mesh=mesh,
        )  # fmt: skip
        return run(program, meta_state, num_outer_steps)
    if key is not None:
        raise ValueError("key must be None where source is an iterable, which brings its own order")

    program = compile_batches(
        learner, optimizer, meta_state, iter(source),
        chunk_size=chunk_size, num_steps_per_dispatch=num_steps_per_dispatch, mesh=mesh,
    )  # fmt: skip
    return run(program, meta_state, num_outer_steps)


def compile_steps(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    meta_state: MetaState,
    source: Callable[[Array], Task],
    *,
    key: Array,
    chunk_size: int | str | None = "auto",
    num_steps_per_dispatch: int = 100,
    mesh: Mesh | None = None,
) -> Program:
    """Compiles a dispatch of up to `num_steps_per_dispatch` outer steps; see `fit`.

    The number of steps is an argument of the program: a shorter last dispatch compiles nothing.
    """
    is_pytree = isinstance(source, jax.tree_util.Partial)
    meta_step = _meta_step(learner, optimizer, chunk_size, mesh)

    def dispatch(meta_state, num_steps, key, source_arrays):
        draw = source_arrays if is_pytree else source

        # All keys at once: on a CPU, making one costs a small network's step a tenth of its time.
        steps = meta_state.step + jnp.arange(num_steps_per_dispatch)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(steps)

        def step(meta_state, number):
            return _guarded(meta_step, meta_state, draw(keys[number]))

        return _many_steps(step, meta_state, num_steps, num_steps_per_dispatch)

    arrays = source if is_pytree else ()
    meta_state, key, arrays = _place((meta_state, key, arrays), mesh)
    start = time.perf_counter()
    compiled = jax.jit(dispatch).lower(meta_state, np.int32(1), key, arrays).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    return Program(
        lambda state, num_steps: compiled(_place(state, mesh), np.int32(num_steps), key, arrays),
        num_steps_per_dispatch,
        seconds,
        None if analysis is None else int(analysis.temp_size_in_bytes),
    )


def compile_batches(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    meta_state: MetaState,
    batches: Iterator[Any],
    *,
    chunk_size: int | str | None = "auto",
    num_steps_per_dispatch: int = 100,
    mesh: Mesh | None = None,
) -> Program:
    """Compiles one outer step, for tasks that the host brings: a stream, or any other iterator.

    The first batch is drawn for its shapes, and is that of the first step. The host waits for the
    device at the end of a dispatch only, so that it can read ahead. With several CPU devices it also
    waits before each step: programs in flight at once, each waiting for all devices in its all-reduce,
    take the threads from one another, and XLA ends the process after 40 seconds.
    """
    meta_step = _meta_step(learner, optimizer, chunk_size, mesh)
    meta_state, first = _place(meta_state, mesh), _spread(_next_batch(batches, 0), mesh)
    start = time.perf_counter()
    step = functools.partial(_guarded, meta_step)
    compiled = jax.jit(step).lower(meta_state, first, jnp.array(True)).compile()
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    drawn = itertools.chain([first], (_spread(tasks, mesh) for tasks in _checked(batches)))

    one_at_a_time = mesh is not None and mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

    def run_steps(meta_state, num_steps):
        rows, alive = [], jnp.array(True)
        for tasks in itertools.islice(drawn, num_steps):
            if one_at_a_time:
                jax.block_until_ready(alive)
            meta_state, metrics, alive = compiled(_place(meta_state, mesh), tasks, alive)
            rows.append((metrics, alive))
        metrics, oks = jax.tree.map(lambda *x: np.stack(x), *jax.device_get(rows))
        return meta_state, metrics, oks.sum()

    return Program(
        run_steps,
        num_steps_per_dispatch,
        seconds,
        None if analysis is None else int(analysis.temp_size_in_bytes),
    )


def run(
    program: Program, meta_state: MetaState, num_outer_steps: int
) -> Iterator[tuple[MetaState, Metrics]]:
    """Makes `num_outer_steps` steps with a compiled program; yields as `fit` does."""
    check_count("num_outer_steps", num_outer_steps)
    while num_outer_steps > 0:
        num_steps = min(num_outer_steps, program.num_steps_per_dispatch)
        meta_state, metrics, done = program.run(meta_state, num_steps)
        yield meta_state, _finish(jax.device_get(metrics), int(done), num_steps, meta_state)
        if int(done) < num_steps:
            return
        num_outer_steps -= num_steps


def steps_per_dispatch(num_outer_steps: int) -> int:
    """Outer steps of one dispatch: hundreds, but a dozen dispatches at least.

    >>> steps_per_dispatch(60_000), steps_per_dispatch(600), steps_per_dispatch(5)
    (500, 50, 1)
    """
    return max(1, min(MAX_STEPS_PER_DISPATCH, num_outer_steps // MIN_DISPATCHES))


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless `value` is a positive integer."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}")


def _meta_step(learner, optimizer, chunk_size, mesh):
    """(meta_state, tasks) -> (meta_state, metrics), on one device or over a mesh of several."""
    options = {"chunk_size": chunk_size}
    if mesh is None or mesh.size == 1:
        return functools.partial(outer.meta_step, learner, optimizer, **options)
    return functools.partial(parallel.meta_step, learner, optimizer, mesh=mesh, **options)


def _place(tree, mesh):
    tree = jax.tree.map(jnp.asarray, tree)
    return tree if mesh is None else parallel.replicate(tree, mesh)


def _guarded(meta_step, meta_state, tasks, alive=True):
    """An outer step that keeps the state as it was from the first one that is not finite."""
    stepped, metrics = meta_step(meta_state, tasks)
    alive &= jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda new, old: jnp.where(alive, new, old), stepped, meta_state)
    return kept, metrics, alive


def _many_steps(step, meta_state, num_steps, most):
    """Steps until `num_steps` are done or one is not finite: (state, metrics [most], number done)."""
    _, shapes, _ = jax.eval_shape(step, meta_state, 0)
    metrics = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), shapes)

    def body(carry):
        meta_state, metrics, done, _ = carry
        meta_state, row, ok = step(meta_state, done)
        metrics = jax.tree.map(lambda rows, x: rows.at[done].set(x), metrics, row)
        return meta_state, metrics, done + ok, ok

    start = meta_state, metrics, jnp.zeros((), jnp.int32), jnp.array(True)
    unfinished = lambda carry: carry[3] & (carry[2] < num_steps)
    return jax.lax.while_loop(unfinished, body, start)[:3]


def _checked(batches):
    for made in itertools.count(1):
        yield _next_batch(batches, made)


def _next_batch(batches, made):
    tasks = next(batches, None)
    if tasks is None:
        raise ValueError(f"source ended after {made} batches of tasks; every outer step needs one")
    outer.check_tasks(tasks)
    return tasks


def _spread(tasks, mesh):
    """Tasks where the compiled step reads them."""
    tasks = jax.tree.map(jnp.asarray, tasks)
    return tasks if mesh is None else parallel.spread(tasks, mesh)


def _finish(metrics, num_good, num_steps, meta_state):
    """The metrics of an item: up to the step that failed, with when and why, if one did."""
    if num_good == num_steps:
        return {name: x[:num_steps] for name, x in metrics.items()}
    rows = {name: x[: num_good + 1] for name, x in metrics.items()}
    failed = "loss" if not np.isfinite(rows["loss"][-1]) else "grad_norm"
    because = f"{failed} is {rows[failed][-1]}"
    return {**rows, "stopped_at": int(meta_state.step), "stopped_because": because}
