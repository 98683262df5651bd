"""The vocabulary of the package: tasks, losses, and the four functions of a meta-learner."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax

Array: TypeAlias = jax.Array
Scalar: TypeAlias = jax.Array | int | float
"""A number or a traced array of shape `[]`."""
Params: TypeAlias = Any
"""A pytree of floating-point arrays: the parameters of a model."""
MetaParams: TypeAlias = Any
"""The values that the outer loop learns: `Params`, or `Extended` for a learner that learns more."""
Batch: TypeAlias = Any
"""A pytree of arrays. The built-in sources give {"inputs", "targets"} and, for padded examples,
"weights" `[num_examples]`. The core accepts any pytree."""
State: TypeAlias = Any
"""The values that a loss function carries and nobody differentiates, such as normalization
statistics; `()` for a loss without them."""
AtStep: TypeAlias = Callable[[Params, Batch, Scalar], tuple[Params, Batch]]
"""`(params, batch, inner_step) -> (params, batch)`: runs before each inner step."""
Mask: TypeAlias = Any
"""The parameters that the inner loop adapts: a pytree of bools with the structure of the parameters
or a prefix of it, a function of a leaf's path ("conv/0/kernel"), or None for all of them."""
View: TypeAlias = Callable[[Params, State], Any]
"""`(adapted, state) -> pytree`: what `trace` records after each inner step."""


class Task(NamedTuple):
    """One task: adapt on `support`, score on `query`.

    *tasks*, in the plural, is a `Task` whose leaves have a leading task axis:
    `[num_tasks, way * shot, ...]` and `[num_tasks, way * query, ...]`.

    Attributes:
        support: the batch to adapt on.
        query: the batch to score.

    Example:
        >>> import jax.numpy as jnp, jaxmaml
        >>> jaxmaml.Task(support=jnp.zeros(5), query=jnp.zeros(15)).query.shape
        (15,)
    """

    support: Batch
    query: Batch


class Extended(NamedTuple):
    """The meta-parameters of a learner that learns more than the initial parameters.

    Attributes:
        params: the initial parameters of the model.
        learned: what else is learned, a pytree under each name, such as {"hyperparams": rates}.

    Example:
        >>> import jax.numpy as jnp, jaxmaml
        >>> learner = jaxmaml.meta_sgd(lambda params, batch: jnp.mean(params**2), 1, inner_lr=0.1)
        >>> meta_params = learner.init(jnp.zeros(2))
        >>> sorted(meta_params.learned)
        ['hyperparams']
    """

    params: Params
    learned: dict[str, Any]


class Info(NamedTuple):
    """The values that are reported beside a loss and never differentiated.

    Attributes:
        query_loss: the mean loss of the adapted parameters on the query, `[]`; `[num_tasks]` once
            batched.
        inner_losses: the support loss before each inner step, `[num_inner_steps]`;
            `[num_tasks, num_inner_steps]` once batched.
        state: the state that the loss function returned last; once batched, its mean over tasks.
        opt_state: the state of the inner optimizer after the last step, of `jaxmaml.adapt` only.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.25), 2)
        >>> adapted, info = learner.adapt(jnp.array(0.0), jnp.ones(4))
        >>> info.inner_losses.tolist()
        [1.0, 0.25]
    """

    query_loss: Any = None
    inner_losses: Any = None
    state: State = ()
    opt_state: Any = None


class MetaState(NamedTuple):
    """Everything that an outer step reads and writes. A checkpoint holds one of these.

    Attributes:
        params: the meta-parameters.
        opt_state: the state of the outer optimizer.
        step: the number of outer steps done, int32 `[]`.
        state: the state that the loss function carries.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> learner = jaxmaml.maml(lambda params, batch: jnp.mean(params**2), optax.sgd(0.1), 1)
        >>> int(jaxmaml.init_state(learner, optax.adam(1e-3), jnp.zeros(2)).step)
        0
    """

    params: MetaParams
    opt_state: Any
    step: Array
    state: State = ()


@runtime_checkable
class OuterOptimizer(Protocol):
    """An outer optimizer that makes the whole outer step, where an optax optimizer has a gradient.

    `fit` and `init_state` take one in place of an optax optimizer.
    """

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics of `meta_step`."""
        ...

    def init(self, params: MetaParams, /) -> Any:
        """Returns the state of the optimizer for these meta-parameters."""
        ...

    def meta_step(
        self, learner: "MetaLearner", meta_state: MetaState, tasks: Task, /, **options: Any
    ) -> tuple[MetaState, dict[str, Array]]:
        """Makes one outer step, with the options and the metrics of `jaxmaml.meta_step`, or more."""
        ...


class Init(Protocol):
    """`(params) -> meta_params`."""

    def __call__(self, params: Params, /) -> MetaParams: ...


class Adapt(Protocol):
    """Runs the inner loop of one task: returns the adapted parameters and an `Info`."""

    def __call__(
        self,
        meta_params: MetaParams,
        support: Batch,
        /,
        *,
        state: State = (),
        num_inner_steps: int | None = None,
    ) -> tuple[Params, Info]: ...


class Trace(Protocol):
    """Records a view of the adapted parameters after 0..n inner steps, leaves `[n + 1, ...]`."""

    def __call__(
        self,
        meta_params: MetaParams,
        support: Batch,
        view: View,
        /,
        *,
        state: State = (),
        num_inner_steps: int | None = None,
    ) -> Any: ...


class MetaLoss(Protocol):
    """The meta-loss of one task, with an `Info`. Its gradient is the meta-gradient."""

    def __call__(
        self, meta_params: MetaParams, task: Task, /, *, step: Scalar = 0, state: State = ()
    ) -> tuple[Array, Info]: ...


class MetaLearner(NamedTuple):
    """A meta-learning algorithm, as four pure functions of one task.

    Attributes:
        init: `(params) -> meta_params`. Meta-SGD, for example, adds learning rates.
        adapt: `(meta_params, support, *, state=(), num_inner_steps=None) -> (adapted, info)`: what
            runs on a new task.
        trace: `(meta_params, support, view, *, state=(), num_inner_steps=None) -> views`, where
            `view(adapted, state)` is recorded after 0..n inner steps: leaves `[n + 1, ...]`.
        loss: `(meta_params, task, *, step=0, state=()) -> (loss, info)`, where `step` is the outer
            step. `jax.grad(learner.loss, has_aux=True)` is the meta-gradient.

    Example:
        >>> import jax, jax.numpy as jnp, optax, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2) / 2
        >>> learner = jaxmaml.maml(loss_fn, optax.sgd(0.5), 1)
        >>> task = jaxmaml.Task(support=jnp.ones(4), query=jnp.ones(4))
        >>> grads, info = jax.grad(learner.loss, has_aux=True)(jnp.array(0.0), task)
        >>> float(grads)
        -0.25
    """

    init: Init
    adapt: Adapt
    trace: Trace
    loss: MetaLoss


PlainFn: TypeAlias = Callable[[Params, Batch], Any]
"""`(params, batch) -> output`."""


@dataclasses.dataclass(frozen=True)
class StatefulFn:
    """A function `(params, batch, state) -> (output, state)`; see `with_state`."""

    fn: Callable[[Params, Batch, State], tuple[Any, State]]

    def __call__(self, params: Params, batch: Batch, state: State) -> tuple[Any, State]:
        return self.fn(params, batch, state)


ModelFn: TypeAlias = Callable[..., Any]
"""A model's outputs, a loss or a metric: `(params, batch) -> output`, or `with_state` of a function
`(params, batch, state) -> (output, state)`."""
LossFn: TypeAlias = ModelFn
"""A `ModelFn` whose output is a floating-point scalar, the mean over examples."""
MetricFn: TypeAlias = ModelFn
"""A `ModelFn` whose output is what `evaluate` reports: a scalar or a pytree of arrays."""


def with_state(fn: Callable[[Params, Batch, State], tuple[Any, State]]) -> StatefulFn:
    """Marks a loss, a model or a metric that carries state.

    Every function of this package that takes `(params, batch) -> output` also takes a marked one.
    The losses of `jaxmaml.nn` mark themselves if their model is marked.

    Args:
        fn: `(params, batch, state) -> (output, state)`. The state is carried through the inner
            steps, from the support to the query, and is not differentiated.

    Raises:
        TypeError: `fn` does not take three arguments.

    Example:
        >>> import jax.numpy as jnp, optax, jaxmaml
        >>> def loss_fn(params, batch, state):
        ...     return jnp.mean((params - batch) ** 2), {"count": state["count"] + 1}
        >>> learner = jaxmaml.maml(jaxmaml.with_state(loss_fn), optax.sgd(0.1), 3)
        >>> _, info = learner.adapt(jnp.array(0.0), jnp.ones(4), state={"count": jnp.array(0)})
        >>> int(info.state["count"])
        3
    """
    if isinstance(fn, StatefulFn):
        return fn
    if not _takes(fn, 3):
        raise TypeError(f"with_state marks a function (params, batch, state); got {_named(fn)}")
    return StatefulFn(fn)


def carries_state(fn: ModelFn) -> bool:
    """Returns whether `with_state` marks the function."""
    return isinstance(fn, StatefulFn)


def as_stateful(fn: ModelFn) -> StatefulFn:
    """Returns the one form that the core computes with, `(params, batch, state) -> (output, state)`.

    A function without state returns the state that it was given.

    Raises:
        TypeError: `fn` takes three arguments and is not marked.

    Example:
        >>> as_stateful(lambda params, batch: params * batch)(2.0, 3.0, ())
        (6.0, ())
    """
    if isinstance(fn, StatefulFn):
        return fn
    if not _takes(fn, 2) and _takes(fn, 3):
        raise TypeError(
            f"a function that takes (params, batch, state) must be marked with jaxmaml.with_state; "
            f"got {_named(fn)}"
        )
    return StatefulFn(lambda params, batch, state: (fn(params, batch), state))


def _takes(fn: Callable[..., Any], num_args: int) -> bool:
    """Returns whether a function can be called with a number of arguments, True if it is unknown."""
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*[None] * num_args)
    except TypeError:
        return False
    return True


def _named(fn: Any) -> str:
    return f"{getattr(fn, '__name__', type(fn).__name__)}{inspect.signature(fn)}"


def in_form_of(like: ModelFn, fn: Callable[[Params, Batch, State], tuple[Any, State]]) -> ModelFn:
    """Returns `fn` in the form that `like` has: with state if `like` carries state, else without.

    Args:
        like: decides the form.
        fn: `(params, batch, state) -> (output, state)`.

    Example:
        >>> double = in_form_of(lambda params, batch: 0, lambda params, batch, state: (2 * batch, ()))
        >>> double(None, 4)
        8
    """
    if carries_state(like):
        return with_state(fn)
    return lambda params, batch: fn(params, batch, ())[0]


@runtime_checkable
class Stream(Protocol):
    """A source of tasks that are read by the host, from any step on.

    With several processes, each of them reads the stream `of_share(index, count)`: one of `count` shares
    of the tasks of each step. A stream without this method serves one process.
    """

    def start(self, key: Array, step: int = 0) -> Any:
        """Returns an iterator over the tasks of `step`, `step + 1`, ... for a typed PRNG key.

        The tasks of a step depend on the key and the step only. The iterator is also a context
        manager that frees its workers.
        """
        ...


@runtime_checkable
class Sampler(Protocol):
    """A traceable source that can draw some tasks of a step without the others."""

    @property
    def num_tasks(self) -> int:
        """The tasks of a step."""
        ...

    def __call__(self, key: Array) -> Task:
        """Returns the tasks of a step."""
        ...

    def some(self, key: Array, index: Array) -> Task:
        """Returns those tasks of a step that have the given numbers, `[n]`, which may be traced."""
        ...
