"""A preset made concrete: the network, the initial parameters, the sources of tasks, the learners.

Nothing here has side effects beyond reading (and for glyphs preparing) a data set; the same preset
and seed give the same experiment.
"""

import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

import jaxmaml
from jaxmaml import metrics, nn, parallel
from jaxmaml.data import pools, sinusoid, sources
from jaxmaml.data.augment import Augment
from jaxmaml.data.pools import Pool
from jaxmaml.train import averaging
from jaxmaml.train.presets import Preset
from jaxmaml.types import Array, Batch, LossFn, MetaLearner, MetaState, Params, Task

Source = Callable[[Array], Task]
"""A jittable `key -> tasks`, a `jax.tree_util.Partial`."""

ORDERS = ("exact", "first")
MAX_TASKS_DRAWN = 100
"""Validation and test draw at most so many tasks at a time, which bounds their memory."""
SCORING_SEEDS = {"val": 1, "test": 2}
"""The tasks scored are the same whatever the seed of the run."""


class Streaming(NamedTuple):
    """How images are streamed, see `jaxmaml.data.stream.sampler`.

    Attributes:
        num_workers: processes that read and decode, 0 for threads of this one.
        cache: whether decoded images are kept in the user's cache directory.
    """

    num_workers: int = 0
    cache: bool = True


class Spec(NamedTuple):
    """One run of an experiment: what its learner is, and what it is called."""

    label: str
    order: str
    inner_lr: float


class Experiment(NamedTuple):
    """What all runs of one preset and seed share.

    Attributes:
        preset: the settings.
        apply_fn: `(params, batch) -> outputs`.
        loss_fn: the mean loss adapted on.
        metric_fn: `(adapted, query) -> ` accuracy or mean squared error.
        params: the initial parameters.
        optimizer: the outer optimiser.
        sources: "train", "val" and "test"; `batches` draws from them.
        train_key: the key of the training episodes.
        mesh: the devices that the tasks of an outer step are spread over.
    """

    preset: Preset
    apply_fn: Callable[[Params, Batch], Array]
    loss_fn: LossFn
    metric_fn: Callable[[Params, Batch], Array]
    params: Params
    optimizer: optax.GradientTransformation
    sources: Mapping[str, Source]
    train_key: Array
    mesh: Mesh


def build(
    preset: Preset,
    *,
    seed: int,
    num_test_tasks: int,
    data_dir: pathlib.Path | None = None,
    classes: Mapping[str, Pool] | None = None,
    streaming: Streaming | None = None,
) -> Experiment:
    """The experiment of a preset.

    Args:
        preset: the settings.
        seed: of the initial parameters and of the training episodes.
        num_test_tasks: tasks of the test.
        data_dir: prepared TFDS directory.
        classes: the images of "train", "val" and "test", where they are at hand; else they are read.
        streaming: how images are read as they are needed; None puts all of them on the device. The
            episodes are the same.

    Raises:
        ValueError: the data set is missing, or cannot give such tasks.
    """
    if num_test_tasks < 1:
        raise ValueError(f"num_test_tasks must be at least 1, got {num_test_tasks}")
    params_key, train_key = jax.random.split(jax.random.key(seed))
    sources = _sources(preset, data_dir, classes, num_test_tasks, streaming)
    apply_fn, params = _network(preset, _input_shape(sources["train"]), params_key)
    loss_fn = (nn.mean_squared_error if preset.is_regression else nn.cross_entropy)(apply_fn)

    def accuracy(adapted: Params, query: Batch) -> Array:
        return metrics.accuracy(apply_fn(adapted, query), query["targets"])

    return Experiment(
        preset=preset,
        apply_fn=apply_fn,
        loss_fn=loss_fn,
        metric_fn=loss_fn if preset.is_regression else accuracy,
        params=params,
        optimizer=averaging.with_average(_outer_optimizer(preset), preset.averaging),
        sources=sources,
        train_key=train_key,
        mesh=parallel.task_mesh(preset.num_tasks),
    )


def learner(experiment: Experiment, spec: Spec) -> MetaLearner:
    """MAML of the run's order and inner rate on the experiment's loss.

    Raises:
        ValueError: an unknown order.
    """
    return make_learner(experiment.preset, experiment.loss_fn, spec.order, spec.inner_lr)


def make_learner(preset: Preset, loss_fn: LossFn, order: str, inner_lr: Any) -> MetaLearner:
    """As `learner`; the inner rate may be traced."""
    return jaxmaml.maml(
        loss_fn,
        optax.sgd(inner_lr),
        preset.num_inner_steps,
        order=order,
        mask=None if preset.adapt_norm else _is_not_norm,
    )


def chunk_size(preset: Preset) -> Any:
    """The preset's chunk size as the core takes it."""
    return None if preset.chunk_size == "all" else preset.chunk_size


def init_state(experiment: Experiment, spec: Spec) -> MetaState:
    """The state that a run starts from: the same parameters whatever the learner."""
    return jaxmaml.init_state(learner(experiment, spec), experiment.optimizer, experiment.params)


def step_tasks(experiment: Experiment, step: int) -> Task:
    """The tasks of one outer step, those that training sees there."""
    return next(batches(experiment, "train", experiment.train_key, step))


def fixed_tasks(experiment: Experiment, part: str, num_tasks: int) -> Iterator[Task]:
    """The tasks of "val" or "test", always the same ones, some at a time; at least `num_tasks`."""
    drawn = 0
    for tasks in batches(experiment, part, jax.random.key(SCORING_SEEDS[part])):
        drawn += len(jax.tree.leaves(tasks)[0])
        yield tasks
        if drawn >= num_tasks:
            return


def batches(experiment: Experiment, part: str, key: Array, first: int = 0) -> Iterator[Task]:
    """The tasks of "train", "val" or "test" for a key at the steps `first`, `first + 1`, ..."""
    source: Any = experiment.sources[part]
    if isinstance(source, _Streamed):
        with source.start(key) as tasks:
            tasks.set_state({"step": first})
            yield from tasks
    else:
        yield from (_draw(source, key, step) for step in itertools.count(first))


@jax.jit
def _draw(source: Any, key: Array, index: Any) -> Task:
    return source(jax.random.fold_in(key, index))


def _sources(
    preset: Preset,
    data_dir: pathlib.Path | None,
    classes: Mapping[str, Pool] | None,
    num_test_tasks: int,
    streaming: Streaming | None,
) -> dict[str, Any]:
    # As many for validation as for the test, so that one program scores both.
    num_val_tasks = preset.num_val_tasks if preset.num_validations else 1
    num_scored = min(max(num_val_tasks, num_test_tasks), MAX_TASKS_DRAWN)
    counts = {"train": preset.num_tasks, "val": num_scored, "test": num_scored}
    query = {"train": preset.query, "val": preset.test_query, "test": preset.test_query}
    if preset.dataset == "sinusoid":
        if streaming is not None:
            raise ValueError("the sinusoid has no images to stream")
        return {
            part: sinusoid.sampler(num_tasks=count, shot=preset.shot, query=query[part])
            for part, count in counts.items()
        }
    where = (preset.dataset, data_dir, preset.split or None, preset.image_size or None)
    sample: Any = pools.sampler
    if streaming is None:
        images: Mapping[str, Any] = classes or sources.load(*where)
    else:
        images = sources.images(*where, cache=streaming.cache)
        sample = functools.partial(_Streamed, num_workers=streaming.num_workers)
    return {
        part: sample(
            images[part],
            num_tasks=count,
            way=preset.way,
            shot=preset.shot,
            query=query[part],
            rotate=preset.rotate_train if part == "train" else preset.rotate_test,
            augment=_augment(preset, part),
        )
        for part, count in counts.items()
    }


def _augment(preset: Preset, part: str) -> Augment:
    """Random changes in training only; the same scaling everywhere."""
    mean, std = sources.scaling(preset.dataset)
    if part != "train":
        return Augment(mean=mean, std=std)
    return Augment(crop=preset.crop, flip=preset.flip, jitter=preset.jitter, mean=mean, std=std)


class _Streamed:
    """A stream that is not started: which key it is of is known later."""

    def __init__(self, images: Any, **settings: Any):
        from jaxmaml.data import stream

        self._start = functools.partial(stream.sampler, images, **settings)
        self.input_shape = images.shape
        self.start(jax.random.key(0)).close()  # what it refuses, it refuses now

    def start(self, key: Array) -> Any:
        """The stream of a key, at its first step."""
        return self._start(key=key)


def _input_shape(source: Any) -> tuple[int, ...]:
    """Of one example."""
    if isinstance(source, _Streamed):
        return source.input_shape
    return jax.eval_shape(source, jax.random.key(0)).support["inputs"].shape[2:]


def _network(preset: Preset, shape: tuple[int, ...], key: Array) -> tuple[Any, Params]:
    head_init = jax.nn.initializers.normal(preset.head_scale)
    if preset.head_scale == 0:
        head_init = jax.nn.initializers.zeros
    if preset.model == "conv":
        module = nn.Conv4(
            preset.way,
            image_shape=shape,
            num_filters=preset.num_filters,
            pooled=preset.pooled,
            head_init=head_init,
            norm_scale=preset.norm_scale,
            rngs=nnx.Rngs(key),
        )
    else:
        module = nn.MLP(
            math.prod(shape),
            preset.way,
            hidden=preset.hidden_sizes,
            norm=preset.norm,
            norm_scale=preset.norm_scale,
            head_init=head_init,
            rngs=nnx.Rngs(key),
        )
    apply_fn, params, _ = nn.from_nnx(module, compute_dtype=_compute_dtype(preset))
    return apply_fn, params


def _outer_optimizer(preset: Preset) -> optax.GradientTransformation:
    adam = optax.adam(preset.outer_lr)
    return optax.chain(optax.clip(preset.outer_clip), adam) if preset.outer_clip else adam


def _compute_dtype(preset: Preset) -> Any:
    return None if preset.compute_dtype == "float32" else preset.compute_dtype


def _is_not_norm(path: str) -> bool:
    return not path.startswith("norm/")
