"""The tasks of a preset: a source for each of the splits "train", "val" and "test"."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax

from jaxmaml import files, rl
from jaxmaml.checks import check_count
from jaxmaml.data import class_splits, datasets, pools, sinusoid
from jaxmaml.data.augmentation import Augment
from jaxmaml.data.class_splits import ClassSplit
from jaxmaml.data.pools import Pool
from jaxmaml.experiments import agents
from jaxmaml.experiments.presets import Preset
from jaxmaml.sources import batches, is_traceable
from jaxmaml.types import Array, Sampler, Task

Source: TypeAlias = Any
"""The result of a `sampler` of `jaxmaml.data`: a `Sampler` or an `ImageStream`."""
Sources: TypeAlias = Mapping[str, Source]
"""The source of each split: "train", "val" and "test"."""

SPLITS = ("train", "val", "test")
MAX_TASKS_DRAWN = 100
"""Validation and test draw at most this number of tasks at a time, which bounds their memory."""


class Streaming(NamedTuple):
    """Options of streamed images; see `jaxmaml.data.stream.sampler`.

    Attributes:
        num_workers: processes that read and decode; 0 uses threads of this process.
        cache: whether decoded images are kept in the user's cache directory.
    """

    num_workers: int = 0
    cache: bool = True


def make_sources(
    preset: Preset,
    *,
    num_test_tasks: int,
    data_dir: pathlib.Path | None = None,
    images: Mapping[str, Pool] | None = None,
    streaming: Streaming | None = None,
    with_classes: bool = False,
    class_split: ClassSplit | None = None,
    splits: Sequence[str] = SPLITS,
) -> Sources:
    """Returns the sources of a preset.

    Args:
        preset: the settings.
        num_test_tasks: tasks of the test.
        data_dir: a prepared TFDS directory.
        images: the images of each split, if they are on the device already; defaults to reading
            them.
        streaming: how images are read during training; defaults to keeping all of them on the
            device. The episodes are the same.
        with_classes: whether training batches hold the number of each example's class among all.
        class_split: the class names of each split; defaults to the preset's.
        splits: those that have a source. The classes of the others need not allow such tasks.

    Raises:
        ValueError: the dataset is missing or cannot give such tasks.
    """
    # Validation draws as many tasks as the test, so that one program scores both.
    check_count("num_test_tasks", num_test_tasks)
    num_val_tasks = preset.num_val_tasks if preset.num_validations else 1
    num_scored = min(max(num_val_tasks, num_test_tasks), MAX_TASKS_DRAWN)
    counts = {"train": preset.num_tasks, "val": num_scored, "test": num_scored}
    queries = {"train": preset.query, "val": preset.test_query, "test": preset.test_query}

    # Regression, and environments.
    if preset.domain != "classification" and streaming is not None:
        raise ValueError(f"{preset.dataset} has no images to stream")
    if preset.domain == "reinforcement":
        env = agents.environment(preset)
        return {split: rl.sampler(env, num_tasks=counts[split]) for split in splits}
    if preset.is_regression:
        return {
            split: sinusoid.sampler(num_tasks=counts[split], shot=preset.shot, query=queries[split])
            for split in splits
        }

    # Images.
    images, sampler = _images(preset, data_dir, images, streaming, class_split)
    _check_ways(preset, {split: images[split] for split in splits})
    return {
        split: sampler(
            images[split], num_tasks=counts[split], query=queries[split],
            classes=with_classes and split == "train", **_episode_options(preset, split),
        )
        for split in splits
    }  # fmt: skip


def _check_ways(preset: Preset, images: Mapping[str, Any]) -> None:
    """Raises ValueError, with the remedies, unless each split has as many classes as a task."""
    for split, found in images.items():
        number = len(found.sizes)
        if preset.way > number:
            raise ValueError(
                f"way={preset.way} is more than the {number} classes of {split} in the class split "
                f"{preset.split or 'of ' + preset.dataset}: reduce way, or divide the classes otherwise "
                "(jaxmaml data split --fractions)"
            )


def fixed_tasks(
    source: Source, key: Array, num_tasks: int, share: tuple[int, int] = (0, 1)
) -> Iterator[Task]:
    """Yields at least `num_tasks` tasks, some at a time, always the same ones for the same key.

    Args:
        source: the source.
        key: its PRNG key.
        num_tasks: the tasks of all shares.
        share: which of them are yielded, see `sources.batches`.
    """
    per_step = source.num_tasks if isinstance(source, Sampler) else source.episode.num_tasks
    num_steps = -(-num_tasks // per_step)
    return itertools.islice(batches(source, key, share=share), num_steps)


def input_shape(source: Source) -> tuple[int, ...]:
    """Returns the shape of one example, or of one observation, of a source."""
    if isinstance(source, rl.RequestSampler):
        return (source.environment.observation_size,)
    if is_traceable(source):
        return jax.eval_shape(source, jax.random.key(0)).support["inputs"].shape[2:]
    return source.input_shape


def num_classes(source: Source) -> int:
    """Returns the number of classes of the images of a source; 0 for regression."""
    return len(class_names(source))


def class_names(source: Source) -> tuple[str, ...]:
    """Returns the names of the classes of the images of a source; none for regression."""
    return getattr(_images_of(source), "names", ())


def class_split_of(sources: Sources) -> ClassSplit | None:
    """Returns the class names of each split that has a source; None for regression."""
    class_split = {split: list(class_names(source)) for split, source in sources.items()}
    return class_split if any(class_split.values()) else None


def class_sizes_of(sources: Sources) -> dict[str, int]:
    """Returns the number of images of each class, by its name, for sources of images."""
    return {
        name: int(size)
        for images in map(_images_of, sources.values())
        for name, size in zip(images.names, images.sizes, strict=True)
    }


def _images_of(source: Source) -> Any:
    return getattr(source, "pool", None) or getattr(source, "images", None)


def located(preset: Preset, data_dir: pathlib.Path | None) -> tuple[Preset, pathlib.Path | None]:
    """Returns a preset and the directory of its dataset with absolute paths.

    They mean the same in another working directory and with other environment variables. The
    directory is None if the dataset is not in one, or is made in the user's cache directory.
    """
    kind, _, rest = preset.dataset.partition(":")
    if kind == "folder":
        dataset = f"folder:{files.expanded(rest).absolute()}"
        preset = dataclasses.replace(preset, dataset=dataset)
    is_image_set = preset.domain == "classification"
    if is_image_set and preset.split and datasets.is_split_file(preset.dataset, preset.split):
        split = files.expanded(preset.split).absolute()
        preset = dataclasses.replace(preset, split=str(split))
    is_made = kind in ("folder", "glyphs") or not is_image_set
    if data_dir is None and is_made:
        return preset, None
    return preset, datasets.data_directory(data_dir).absolute()


def drawn_class_split(preset: Preset) -> ClassSplit | None:
    """Returns the division of the classes of a folder for which a preset names no split file.

    It depends on the names of the classes only, so that runs with other seeds are tested on the same
    classes, and val and test have enough of them for the preset. It is None for other datasets and if
    there is a split file.

    Raises:
        ValueError: the folder does not exist, or has too few classes.
    """
    if preset.split or not preset.dataset.startswith("folder:"):
        return None
    names = datasets.class_names(preset.dataset)
    needed, most = len(SPLITS) * preset.way, len(names) // len(SPLITS)
    if len(names) < needed:
        # A task of images has two classes or more.
        fewer = (
            f"or reduce way to at most {most}"
            if most >= 2
            else f"at least {2 * len(SPLITS) - len(names)} for way=2"
        )
        raise ValueError(
            f"dataset {preset.dataset!r} has {len(names)} classes, and way={preset.way} needs {needed}, "
            f"which are divided into train, val and test: add classes, {fewer}"
        )
    return class_splits.draw(names, smallest=preset.way)


def _images(
    preset: Preset,
    data_dir: pathlib.Path | None,
    images: Mapping[str, Pool] | None,
    streaming: Streaming | None,
    class_split: ClassSplit | None,
) -> tuple[Mapping[str, Any], Callable[..., Source]]:
    """Returns the images of each split, and the constructor of a source of episodes from them."""
    classes = class_split or preset.split or (None if images else drawn_class_split(preset))
    where = (preset.dataset, data_dir, classes, preset.image_size or None)
    if streaming is None:
        return images or datasets.load(*where), pools.sampler
    from jaxmaml.data import stream

    found = datasets.images(*where, cache=streaming.cache)
    return found, functools.partial(stream.sampler, num_workers=streaming.num_workers)


def _episode_options(preset: Preset, split: str) -> dict[str, Any]:
    """Returns the options of the episodes of a split: random changes happen in training only."""
    mean, std = datasets.scaling(preset.dataset)
    changes: dict[str, Any] = {}
    if split == "train":
        changes = {"crop": preset.crop, "flip": preset.flip, "jitter": preset.jitter}
    return {
        "way": preset.way,
        "shot": preset.shot,
        "rotate": preset.rotate_train if split == "train" else preset.rotate_test,
        "augment": Augment(mean=mean, std=std, **changes),
    }
