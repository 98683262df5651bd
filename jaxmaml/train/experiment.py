"""A preset made concrete: the network, the initial parameters, the sources of tasks, the learners.

Nothing here has side effects beyond reading (and for glyphs preparing) a data set; the same preset
and seed give the same experiment.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

import jaxmaml
from jaxmaml import parallel
from jaxmaml.data import datasets, pools, sinusoid
from jaxmaml.data.augmentation import Augment
from jaxmaml.data.pools import Pool
from jaxmaml.train import averaging, family, network
from jaxmaml.train.family import Parts
from jaxmaml.train.network import Model
from jaxmaml.train.presets import Preset
from jaxmaml.types import Array, MetaLearner, MetaState, Params, State, Task

Source = Callable[[Array], Task]
"""A jittable `key -> tasks`, a `jax.tree_util.Partial`; or a stream that is not started."""

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
    learner: str = "maml"


class Experiment(NamedTuple):
    """What all runs of one preset and seed share.

    Attributes:
        preset: the settings.
        model: the functions of the network.
        params: the initial parameters.
        state: the initial statistics of the normalisation, `()` for none.
        optimizer: the outer optimiser.
        sources: "train", "val" and "test"; `batches` draws from them.
        num_classes: of the training split; 0 for regression.
        train_key: the key of the training episodes.
        mesh: the devices that the tasks of an outer step are spread over.
    """

    preset: Preset
    model: Model
    params: Params
    state: State
    optimizer: optax.GradientTransformation
    sources: Mapping[str, Source]
    num_classes: int
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
    with_classes: bool = False,
    trained_as: Preset | None = None,
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
        with_classes: training batches also tell each example's class among all.
        trained_as: the settings of the network, where `preset` has other tasks than it was trained
            on.

    Raises:
        ValueError: the data set is missing, or cannot give such tasks.
    """
    if num_test_tasks < 1:
        raise ValueError(f"num_test_tasks must be at least 1, got {num_test_tasks}")
    params_key, train_key = jax.random.split(jax.random.key(seed))
    sources = _sources(preset, data_dir, classes, num_test_tasks, streaming, with_classes)
    model, params, state = network.build(
        trained_as or preset, input_shape(sources["train"]), params_key
    )
    return Experiment(
        preset=preset,
        model=model,
        params=params,
        state=state,
        optimizer=averaging.with_average(_outer_optimizer(preset), preset.averaging),
        sources=sources,
        num_classes=_num_classes(sources["train"]),
        train_key=train_key,
        mesh=parallel.task_mesh(preset.num_tasks),
    )


def parts(experiment: Experiment) -> Parts:
    """What a learner of the experiment is made of."""
    return Parts(experiment.preset, experiment.model, experiment.num_classes)


def learner(experiment: Experiment, spec: Spec) -> MetaLearner:
    """The learner of a run.

    Raises:
        ValueError: an unknown learner or order, or one that does not fit the preset.
    """
    made_of = parts(experiment)
    family.check(made_of, spec.learner, spec.order)
    return family.make(made_of, spec.learner, spec.order, spec.inner_lr)


def chunk_size(preset: Preset) -> Any:
    """The preset's chunk size as the core takes it."""
    return None if preset.chunk_size == "all" else preset.chunk_size


def init_state(experiment: Experiment, spec: Spec) -> MetaState:
    """The state that a run starts from: the same parameters whatever the learner."""
    return jaxmaml.init_state(
        learner(experiment, spec), experiment.optimizer, experiment.params, experiment.state
    )


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
    with_classes: bool,
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
        images: Mapping[str, Any] = classes or datasets.load(*where)
    else:
        images = datasets.images(*where, cache=streaming.cache)
        if with_classes:
            raise ValueError("joint pre-training needs class numbers, which a stream does not give")
        sample = functools.partial(_Streamed, num_workers=streaming.num_workers)
    more = {"train": {"classes": True} if with_classes else {}}
    return {
        part: sample(
            images[part],
            num_tasks=count,
            way=preset.way,
            shot=preset.shot,
            query=query[part],
            rotate=preset.rotate_train if part == "train" else preset.rotate_test,
            augment=_augment(preset, part),
            **more.get(part, {}),
        )
        for part, count in counts.items()
    }


def _augment(preset: Preset, part: str) -> Augment:
    """Random changes in training only; the same scaling everywhere."""
    mean, std = datasets.scaling(preset.dataset)
    if part != "train":
        return Augment(mean=mean, std=std)
    return Augment(crop=preset.crop, flip=preset.flip, jitter=preset.jitter, mean=mean, std=std)


class _Streamed:
    """A stream of tasks of images on disk."""

    def __init__(self, images: Any, **settings: Any):
        from jaxmaml.data import stream

        self._source = stream.sampler(images, **settings)
        self.input_shape = self._source.input_shape

    def start(self, key: Array) -> Any:
        """The stream of a key, at its first step."""
        return self._source.start(key)


def input_shape(source: Any) -> tuple[int, ...]:
    """Of one example."""
    if isinstance(source, _Streamed):
        return source.input_shape
    return jax.eval_shape(source, jax.random.key(0)).support["inputs"].shape[2:]


def _num_classes(source: Source) -> int:
    """Of a pool's images; 0 where there are none on the device."""
    pool = source.args[0] if isinstance(source, jax.tree_util.Partial) and source.args else None
    return len(pool.names) if isinstance(pool, Pool) else 0


def _outer_optimizer(preset: Preset) -> optax.GradientTransformation:
    rate: Any = preset.outer_lr
    if preset.outer_schedule == "cosine":
        rate = optax.cosine_decay_schedule(preset.outer_lr, preset.num_outer_steps, alpha=0.01)
    adam = optax.adam(rate)
    return optax.chain(optax.clip(preset.outer_clip), adam) if preset.outer_clip else adam
