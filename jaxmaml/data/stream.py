"""Streams: sources of tasks whose images are read from disk, ahead of the step that needs them.

The tasks of a step depend on the key and the step only, and equal those that `pools.sampler` gives
for the same images. So a stream can be stopped, restored, moved, or exchanged for a pool.

The parent process draws the plans of a block of steps (`episodes.plan_step`) and writes them to a
temporary directory. Threads or worker processes, which run no JAX, read the plan of a step there
and the images that it names. The device makes these into tasks.
"""

import dataclasses
import functools
import multiprocessing
import os
import shutil
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from jaxmaml import files
from jaxmaml.checks import check_count
from jaxmaml.data import episodes
from jaxmaml.data.augmentation import NONE, Augment
from jaxmaml.data.episodes import Episode, Plan
from jaxmaml.data.stored_images import Images
from jaxmaml.types import Array, Task

STEPS_PER_BLOCK = 64
"""Steps whose plans are drawn at once."""
READ_AHEAD = 4
"""Steps that the threads, or each worker process, read ahead."""
ON_DEVICE = 2
"""Steps on the device at a time: one in use, one being transferred."""
MAX_STEPS = 2**31 - 1
"""Steps per key: `fold_in` takes 32 bits."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageStream:
    """A source of tasks that are read from disk. `sampler` returns one.

    Attributes:
        images: the images of one split.
        episode: the settings of the episodes.
        num_workers: processes that read and decode images, or 0 for threads.
        share: the tasks of each step that this process reads, a range within
            0..episode.num_tasks-1.

    Example:
        >>> from jaxmaml.data import stored_images
        >>> pixels = np.zeros((40, 8, 8, 1), np.uint8)
        >>> images = stored_images.from_arrays(pixels, np.arange(40) % 4, "abcd")
        >>> source = sampler(images, num_tasks=3, way=2, shot=1, query=5)
        >>> source.input_shape, source.share
        ((8, 8, 1), range(0, 3))
    """

    images: Images
    episode: Episode
    num_workers: int
    share: range

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of one example: (height, width, channels)."""
        return self.images.shape

    def of_share(self, index: int, count: int) -> "ImageStream":
        """Returns the stream of one of `count` shares of the tasks of each step.

        Args:
            index: the number of the share.
            count: the number of shares, whose sizes differ by one task at most.
        """
        return dataclasses.replace(self, share=_share(self.episode.num_tasks, (index, count)))

    def start(self, key: Array, step: int = 0) -> "StreamIterator":
        """Returns an iterator over the tasks of `step`, `step + 1`, and so on, without end.

        Args:
            key: a typed PRNG key.
            step: the first step.

        Raises:
            TypeError: `step` is not an integer.
            ValueError: `step` is negative or too large.
        """
        return StreamIterator(self, key, step)


class StreamIterator(Iterator[Task]):
    """An endless iterator over the tasks of a stream. `ImageStream.start` returns one.

    `get_state` and `set_state` move it to any step. Close it, or use it as a context manager, to
    end its workers at once; otherwise they end when it is garbage-collected. A closed stream gives
    no more tasks.

    Args:
        source: the stream.
        key: a typed PRNG key.
        step: the first step.

    Example:
        >>> from jaxmaml.data import stored_images
        >>> pixels = np.zeros((40, 8, 8, 1), np.uint8)
        >>> images = stored_images.from_arrays(pixels, np.arange(40) % 4, "abcd")
        >>> source = sampler(images, num_tasks=3, way=2, shot=1, query=5)
        >>> with source.start(jax.random.key(0), step=7) as tasks:
        ...     next(tasks).query["inputs"].shape, tasks.get_state()
        ((3, 10, 8, 8, 1), {'step': 8})
    """

    def __init__(self, source: ImageStream, key: Array, step: int = 0):
        _check_step(step)
        self._source, self._key = source, key
        self._directory = tempfile.mkdtemp(prefix="jaxmaml-plans-")
        self._remove = weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self._is_closed = False
        self.set_state({"step": step})

    def __next__(self) -> Task:
        """Returns the tasks of the next step, on the device."""
        if self._is_closed:
            raise StopIteration
        while len(self._ready) < ON_DEVICE and self._read < MAX_STEPS:
            self._ready.append(self._put(self._read))
            self._read += 1
        if not self._ready:
            raise StopIteration
        self._step += 1
        return self._ready.popleft()

    def __enter__(self) -> "StreamIterator":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_tasks(self) -> int:
        """The number of tasks per step that this process reads."""
        return len(self._source.share)

    def get_state(self) -> dict[str, int]:
        """Returns the position, for `set_state` of this or an equal stream with the same key."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Moves to another step.

        Args:
            state: a result of `get_state`.

        Raises:
            TypeError, ValueError: `state` has no step that is possible.
            ValueError: the stream is closed.
        """
        if self._is_closed:
            raise ValueError("the stream is closed; start another one")
        step = _check_step(state.get("step"))
        self._step = self._read = step
        self._ready: deque[Task] = deque()
        self._planned = step // STEPS_PER_BLOCK  # the first block whose plans are not written
        self._batches: Iterator[Any] | None = None  # the first `next` starts it

    def close(self) -> None:
        """Ends the workers, and removes the plans and the tasks that are ready."""
        self._is_closed = True
        self._batches = None
        self._ready.clear()
        self._remove()

    def _put(self, step: int) -> Task:
        """Reads the images of the next step and makes them into tasks on the device."""
        self._plan_ahead()
        if self._batches is None:
            self._batches = self._pipeline(step)
        source, key = self._source, jax.random.fold_in(self._key, step)
        try:
            plans, images = next(self._batches)
            return _to_tasks(source.episode, source.share, source.images.starts, plans, images, key)
        except BaseException:
            # The pipeline is beyond this step: whoever goes on starts another one at it.
            self._batches = None
            raise

    def _pipeline(self, step: int) -> Iterator[Any]:
        reader = _StepReader(self._source.images, self._directory, step)
        dataset = grain.MapDataset.source(reader)
        threads = grain.ReadOptions(num_threads=READ_AHEAD, prefetch_buffer_size=READ_AHEAD)
        if self._source.num_workers == 0:
            return iter(dataset.to_iter_dataset(threads))
        _parse_absl_flags()
        workers = grain.MultiprocessingOptions(self._source.num_workers, per_worker_buffer_size=1)
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        started = functools.partial(_end_with_parent, self._directory)
        return iter(dataset.to_iter_dataset(one_thread).mp_prefetch(workers, started))

    def _plan_ahead(self) -> None:
        """Writes the plans of the next step's block, and of the blocks that may be read meanwhile."""
        # A worker with its queues is up to six steps ahead.
        ahead = 1 + 8 * self._source.num_workers // STEPS_PER_BLOCK
        last = min(self._read // STEPS_PER_BLOCK + ahead, (MAX_STEPS - 1) // STEPS_PER_BLOCK)
        while self._planned <= last:
            self._write_plans(self._planned)
            for name in Plan._fields:
                old = _plan_file(self._directory, name, self._planned - ahead - 2)
                old.unlink(missing_ok=True)
            self._planned += 1

    def _write_plans(self, block: int) -> None:
        """Writes the plans of a block of steps, which are the same whenever they are drawn."""
        paths = [_plan_file(self._directory, name, block) for name in Plan._fields]
        if all(path.exists() for path in paths):
            return
        # The plans are needed on the host, so they are drawn there.
        images, share = self._source.images, self._source.share
        key = jax.device_put(self._key, jax.local_devices(backend="cpu")[0])
        first_step = block * STEPS_PER_BLOCK
        plans = _plan_block(self._source.episode, images.starts, images.sizes, key, first_step)
        for path, leaf in zip(paths, plans, strict=True):
            with files.atomic_write(path) as file:  # readers may look at any time
                np.save(file, np.asarray(leaf)[:, share.start : share.stop])


class _StepReader:
    """A random-access source of grain: the plans and the images of one step per index."""

    def __init__(self, images: Images, directory: str, first_step: int):
        self.images, self.directory, self.first_step = images, directory, first_step

    def __len__(self) -> int:
        return MAX_STEPS - self.first_step

    def __getitem__(self, index: int) -> tuple[Plan, np.ndarray]:
        block, place = divmod(self.first_step + int(index), STEPS_PER_BLOCK)
        paths = [_plan_file(self.directory, name, block) for name in Plan._fields]
        leaves: list[Any] = [np.array(files.map_array(path)[place]) for path in paths]
        plans = Plan(*leaves)
        return plans, self.images.read(plans.examples)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(first_step={self.first_step})"


def _plan_file(directory: str, name: str, block: int) -> Path:
    return Path(directory, f"{name}-{block}.npy")


def sampler(
    images: Images,
    *,
    num_tasks: int,
    way: int,
    shot: int,
    query: int,
    rotate: bool = False,
    augment: Augment = NONE,
    classes: bool = False,
    num_workers: int = 0,
    share: tuple[int, int] = (0, 1),
) -> ImageStream:
    """Returns a source of tasks whose images are read from disk.

    The tasks of step i are those that `pools.sampler` gives for `fold_in(key, i)`. Memory does not
    grow with the dataset: the images of a few steps are read ahead, and the tasks of two steps are
    on the device.

    Args:
        images: the images of one split, for example of `datasets.images`.
        num_tasks: tasks per step, summed over all shares.
        way, shot, query, rotate, augment, classes: see `pools.sampler`.
        num_workers: processes that read and decode images. Defaults to 0, which reads in threads of
            this process: that is enough for decoded images in the cache.
        share: (index, count): which of `count` shares of the tasks of a step are read, for a loop of
            your own over several processes. `fit` and `evaluate` choose it themselves.

    Returns:
        An `ImageStream`, which `jaxmaml.fit` and `jaxmaml.evaluate` take as a source. Its `start`
        returns an iterator of `Task`.

    Raises:
        TypeError: a count is not an integer.
        ValueError: the images do not allow such episodes, or a share that does not exist. A damaged
            record raises when it is read, with its file and number.

    Example:
        >>> from jaxmaml.data import stored_images
        >>> pixels = np.zeros((40, 8, 8, 1), np.uint8)
        >>> images = stored_images.from_arrays(pixels, np.arange(40) % 4, "abcd")
        >>> source = sampler(images, num_tasks=3, way=2, shot=1, query=5)
        >>> with source.start(jax.random.key(0)) as tasks:
        ...     next(tasks).query["inputs"].shape
        (3, 10, 8, 8, 1)
    """
    episode = Episode(
        num_tasks=num_tasks, way=way, shot=shot, query=query, rotate=rotate, augment=augment,
        classes=classes,
    )  # fmt: skip
    episode = episodes.checked(episode, images)
    num_workers = check_count("num_workers", num_workers, minimum=0)
    return ImageStream(images, episode, num_workers, _share(episode.num_tasks, share))


def _share(num_tasks: int, share: tuple[int, int]) -> range:
    index, count = share
    if not 0 <= index < count:
        raise ValueError(f"share must be (index, count) with 0 <= index < count; got {share}")
    return range(index * num_tasks // count, (index + 1) * num_tasks // count)


def _check_step(step: Any) -> int:
    step = check_count("step", step, minimum=0)
    if step >= MAX_STEPS:
        raise ValueError(f"step must be less than {MAX_STEPS}; got {step}")
    return step


@functools.partial(jax.jit, static_argnums=0)
def _plan_block(episode: Episode, starts: Any, sizes: Any, key: Array, first_step: Any) -> Plan:
    """Returns the plans of a block, leaves `[STEPS_PER_BLOCK, num_tasks, ...]`."""
    steps = first_step + jnp.arange(STEPS_PER_BLOCK)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(steps)
    return jax.lax.map(functools.partial(episodes.plan_step, episode, starts, sizes), keys)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _to_tasks(
    episode: Episode, share: range, starts: Array, plans: Plan, images: Array, key: Array
) -> Task:
    keys = jax.random.split(key, episode.num_tasks)[share.start : share.stop]
    return episodes.to_tasks(episode, starts, plans, images, keys)


def _end_with_parent(directory: str, worker: int, num_workers: int) -> None:
    """Makes a worker process end as soon as its parent is gone, with the plans in `directory`.

    A parent that is killed cannot end its workers, and they would wait for it without end.
    """

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # a worker has one
        parent.join()
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(1)  # the main thread may be blocked

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def _parse_absl_flags() -> None:
    """Marks absl's flags as parsed: grain's workers do not start before."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
