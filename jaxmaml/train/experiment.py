"""A preset made concrete: the network, the initial parameters, the sources of tasks, the learners.

Nothing here has side effects beyond reading (and for glyphs preparing) a data set; the same preset
and seed give the same experiment.
"""

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
        sources: "train", "val" and "test".
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
) -> Experiment:
    """The experiment of a preset.

    Args:
        preset: the settings.
        seed: of the initial parameters and of the training episodes.
        num_test_tasks: tasks of the test.
        data_dir: prepared TFDS directory.
        classes: the images of "train", "val" and "test", where they are at hand; else they are read.

    Raises:
        ValueError: the data set is missing, or cannot give such tasks.
    """
    if num_test_tasks < 1:
        raise ValueError(f"num_test_tasks must be at least 1, got {num_test_tasks}")
    params_key, train_key = jax.random.split(jax.random.key(seed))
    sources = _sources(preset, data_dir, classes, num_test_tasks)
    tasks = jax.eval_shape(sources["train"], train_key)
    apply_fn, params = _network(preset, tasks, params_key)
    loss_fn = (nn.mean_squared_error if preset.is_regression else nn.cross_entropy)(apply_fn)

    def accuracy(adapted: Params, query: Batch) -> Array:
        return metrics.accuracy(apply_fn(adapted, query), query["targets"])

    return Experiment(
        preset=preset,
        apply_fn=apply_fn,
        loss_fn=loss_fn,
        metric_fn=loss_fn if preset.is_regression else accuracy,
        params=params,
        optimizer=averaging.with_average(optax.adam(preset.outer_lr), preset.averaging),
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
    return _draw(experiment.sources["train"], experiment.train_key, step)


def fixed_tasks(experiment: Experiment, part: str, num_tasks: int) -> Iterator[Task]:
    """The tasks of "val" or "test", always the same ones, some at a time; at least `num_tasks`."""
    drawn = 0
    for index in itertools.count():
        if drawn >= num_tasks:
            return
        tasks = _draw(experiment.sources[part], jax.random.key(SCORING_SEEDS[part]), index)
        drawn += len(jax.tree.leaves(tasks)[0])
        yield tasks


@jax.jit
def _draw(source: Any, key: Array, index: Any) -> Task:
    return source(jax.random.fold_in(key, index))


def _sources(
    preset: Preset,
    data_dir: pathlib.Path | None,
    classes: Mapping[str, Pool] | None,
    num_test_tasks: int,
) -> dict[str, Any]:
    # As many for validation as for the test, so that one program scores both.
    num_val_tasks = preset.num_val_tasks if preset.num_validations else 1
    num_scored = min(max(num_val_tasks, num_test_tasks), MAX_TASKS_DRAWN)
    counts = {"train": preset.num_tasks, "val": num_scored, "test": num_scored}
    query = {"train": preset.query, "val": preset.test_query, "test": preset.test_query}
    if preset.dataset == "sinusoid":
        return {
            part: sinusoid.sampler(num_tasks=count, shot=preset.shot, query=query[part])
            for part, count in counts.items()
        }
    loaded = classes or sources.load(preset.dataset, data_dir, preset.split)
    return {
        part: pools.sampler(
            loaded[part],
            num_tasks=count,
            way=preset.way,
            shot=preset.shot,
            query=query[part],
            rotate=preset.rotate_train if part == "train" else preset.rotate_test,
        )
        for part, count in counts.items()
    }


def _network(preset: Preset, tasks: Task, key: Array) -> tuple[Any, Params]:
    shape = tasks.support["inputs"].shape[2:]
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


def _compute_dtype(preset: Preset) -> Any:
    return None if preset.compute_dtype == "float32" else preset.compute_dtype


def _is_not_norm(path: str) -> bool:
    return not path.startswith("norm/")
