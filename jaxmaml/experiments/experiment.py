"""An experiment: what all runs of one preset and seed share.

Building one has no side effects except reading (and for glyphs preparing) a dataset. The same preset
and seed give the same experiment.
"""

import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

import jaxmaml
from jaxmaml import averaging, parallel, rl
from jaxmaml.data.class_splits import ClassSplit
from jaxmaml.data.pools import Pool
from jaxmaml.experiments import agents, candidates, devices, interruption, networks, ranges
from jaxmaml.experiments.candidates import Candidate, Spec
from jaxmaml.experiments.devices import Devices
from jaxmaml.experiments.networks import Model, Network
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.tasks import (
    SPLITS,
    Sources,
    Streaming,
    fixed_tasks,
    input_shape,
    make_sources,
    num_classes,
)
from jaxmaml.sources import batches
from jaxmaml.types import Array, MetaState, OuterOptimizer, Task

MAX_SEED = 2**32 - 1
"""The largest seed: JAX would take a larger one modulo 2^32."""
SCORING_SEED = 0
"""The seed of the scored tasks, which do not depend on the seed of the run."""
PROMP_EPOCHS = 5
"""The updates of an outer step of ProMP."""


class Experiment(NamedTuple):
    """The data, network and optimizer that all runs of one preset and seed share.

    Attributes:
        preset: the settings.
        network: the network, with its initial parameters and statistics.
        optimizer: the outer optimizer.
        sources: the source of each split.
        num_classes: classes of the training split; 0 for regression, and without that split.
        train_key: the key of the training episodes.
        learner_key: the key of initial parameters that only one learner has.
        devices: what computes the outer steps.
    """

    preset: Preset
    network: Network
    optimizer: optax.GradientTransformation | OuterOptimizer
    sources: Sources
    num_classes: int
    train_key: Array
    learner_key: Array
    devices: Devices

    @property
    def mesh(self) -> Mesh:
        """The devices over which the tasks of an outer step are spread."""
        return self.devices.mesh


def build_experiment(
    preset: Preset,
    *,
    seed: int,
    num_test_tasks: int,
    data_dir: pathlib.Path | None = None,
    images: Mapping[str, Pool] | None = None,
    streaming: Streaming | None = None,
    with_classes: bool = False,
    trained_as: Preset | None = None,
    class_split: ClassSplit | None = None,
    splits: Sequence[str] = SPLITS,
    used: Devices | None = None,
) -> Experiment:
    """Returns the experiment of a preset.

    Args:
        preset: the settings.
        seed: the seed of the initial parameters and of the training episodes.
        num_test_tasks: tasks of the test.
        data_dir: a prepared TFDS directory.
        images: the images of each split, if they are on the device already.
        streaming: how images are read during training; defaults to keeping them on the device.
        with_classes: whether training batches hold the number of each example's class among all.
        trained_as: the settings of the network, if `preset` has other tasks than those of training.
        class_split: the class names of each split; defaults to the preset's.
        splits: those that are used, "test" among them; see `make_sources`.
        used: what computes; defaults to as many devices as can share the tasks of a step.

    Raises:
        ValueError: the dataset is missing or cannot give such tasks.
    """
    train_key = key_of(seed, "training tasks")  # a seed that is refused is refused first
    sources = make_sources(
        preset, num_test_tasks=num_test_tasks, data_dir=data_dir, images=images,
        streaming=streaming, with_classes=with_classes, class_split=class_split, splits=splits,
    )  # fmt: skip
    network = _network(trained_as or preset, sources, key_of(seed, "parameters"))
    return Experiment(
        preset=preset,
        network=network,
        optimizer=outer_optimizer(preset, network.model),
        sources=sources,
        num_classes=num_classes(sources["train"]) if "train" in sources else 0,
        train_key=train_key,
        learner_key=key_of(seed, "parameters of a learner"),
        devices=used or devices.choose(preset.num_tasks),
    )


def with_seed(experiment: Experiment, seed: int) -> Experiment:
    """Returns the experiment of another seed, with the same data and the same functions.

    Programs are compiled for functions: all seeds share those of the first one.
    """
    own = _network(experiment.preset, experiment.sources, key_of(seed, "parameters"))
    return experiment._replace(
        network=experiment.network._replace(params=own.params),
        train_key=key_of(seed, "training tasks"),
        learner_key=key_of(seed, "parameters of a learner"),
    )


def _network(preset: Preset, sources: Sources, key: Array) -> Network:
    if preset.domain == "reinforcement":
        return agents.build(preset, key)
    return networks.build(preset, input_shape(sources["test"]), key)


def build_candidate(experiment: Experiment, spec: Spec) -> Candidate:
    """Returns the candidate of a run.

    Raises:
        ValueError: an unknown learner or order, or one that does not suit the preset.
    """
    return candidates.build(
        spec, experiment.preset, experiment.network.model, experiment.num_classes,
        experiment.learner_key,
    )  # fmt: skip


def init_state(experiment: Experiment, candidate: Candidate) -> MetaState:
    """Returns the state at which a run starts: every learner starts from the same parameters."""
    network = experiment.network
    meta_state = jaxmaml.init_state(
        candidate.learner, experiment.optimizer, network.params, network.state
    )
    return experiment.devices.place(meta_state)


def step_tasks(experiment: Experiment, step: int) -> Task:
    """Returns the tasks that training uses in one outer step."""
    return next(batches(experiment.sources["train"], experiment.train_key, step))


def scored_tasks(
    experiment: Experiment, split: str, num_tasks: int, share: tuple[int, int] = (0, 1)
) -> Iterator[Task]:
    """Yields at least `num_tasks` tasks of "val" or "test", some at a time, always the same ones.

    With a share, it yields those of one process only, see `sources.batches`.
    """
    key = key_of(SCORING_SEED, f"{split} tasks")
    return fixed_tasks(experiment.sources[split], key, num_tasks, share)


def own_tasks(experiment: Experiment, split: str, num_tasks: int) -> Iterator[Task]:
    """Yields the share of `scored_tasks` that this process scores, while all others score theirs.

    An interruption of any process is raised between two batches.
    """
    share = parallel.share_of(experiment.mesh)
    for tasks in scored_tasks(experiment, split, num_tasks, share):
        interruption.check()
        yield tasks


def key_of(seed: int, name: str) -> Array:
    """Returns the PRNG key of one use of a seed.

    Each use has its own name, and nothing uses the root key of a seed, so that no two uses of a seed
    and no two seeds share random bits.

    Args:
        seed: 0 to 2^32 - 1.
        name: what the key is for.

    Raises:
        TypeError, ValueError: the seed is not such an integer.
    """
    ranges.check_whole("seed", seed, minimum=0, maximum=MAX_SEED)
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def outer_optimizer(preset: Preset, model: Model) -> optax.GradientTransformation | OuterOptimizer:
    """Returns the outer optimizer of a preset. Adam also keeps the average of the parameters.

    Args:
        preset: the settings.
        model: the functions of the network.
    """
    if preset.outer == "trpo":
        assert model.problem is not None  # `ranges.check` has refused trpo outside environments
        return rl.trpo(model.problem, max_kl=preset.max_kl)
    # Schedule and average count the updates of Adam, of which an outer step of ProMP makes several.
    num_updates = PROMP_EPOCHS if preset.outer == "promp" else 1
    rate: Any = preset.outer_lr
    if preset.outer_schedule == "cosine":
        length = num_updates * preset.num_outer_steps
        rate = optax.cosine_decay_schedule(preset.outer_lr, length, alpha=0.01)
    adam = optax.adam(rate)
    clipped = optax.chain(optax.clip(preset.outer_clip), adam) if preset.outer_clip else adam
    averaged = averaging.with_average(clipped, preset.averaging ** (1 / num_updates))
    if preset.outer == "promp":
        assert model.problem is not None
        return rl.promp(model.problem, averaged, num_epochs=PROMP_EPOCHS)
    return averaged
