"""Episodes whose images stay on disk, read ahead: those that a pool of the same images would give.

The parent process draws the plans (`episodes.plan`) of a block of steps at a time and leaves them in a
directory of its own; threads or worker processes, which run no JAX, read a step's plan there and the
images that it names; the device makes these tasks. The tasks of a step depend on the key and the
step alone, so that a stream can be stopped, restored, moved, or exchanged for a pool.
"""

import functools
import shutil
import tempfile
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
from jaxmaml.data import augment as augmenting
from jaxmaml.data import episodes
from jaxmaml.data.augment import Augment
from jaxmaml.data.episodes import Episode, Plan
from jaxmaml.data.images import Images
from jaxmaml.types import Array, Task

STEPS_PER_BLOCK = 64
"""Plans drawn at once; what is read ahead is far less."""
READ_AHEAD = 4
"""Steps that threads, or each worker, read ahead."""
ON_DEVICE = 2
"""Steps on the device at a time: one in use, one on its way."""
MAX_STEPS = 2**31 - 1
"""`fold_in` takes 32 bits."""


class Stream(Iterator[Task]):
    """An endless iterator of batches of tasks; made by `sampler`.

    `get_state` and `set_state` move it to any step. Close it, or use it in a `with`, to end its
    workers at once; else they end with it.
    """

    def __init__(self, images: Images, episode: Episode, key: Array, num_workers: int, part: range):
        self._images, self._episode, self._key = images, episode, key
        self._num_workers, self._part = num_workers, part
        self._directory = tempfile.mkdtemp(prefix="jaxmaml-plans-")
        self._remove = weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self.set_state({"step": 0})

    def __next__(self) -> Task:
        """The tasks of the next step, on the device."""
        while len(self._ready) < ON_DEVICE:
            self._ready.append(self._put(self._read))
            self._read += 1
        self._step += 1
        return self._ready.popleft()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_tasks(self) -> int:
        """Tasks of a batch: those of this process."""
        return len(self._part)

    def get_state(self) -> dict[str, int]:
        """Where it is: restored by `set_state`, here or in a stream of the same settings and key."""
        return {"step": self._step}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes to a step.

        Raises:
            ValueError: the state is none that `get_state` gives.
        """
        step = state.get("step")
        if not isinstance(step, int) or not 0 <= step < MAX_STEPS:
            raise ValueError(f"state must be {{'step': number}} with 0 <= number, got {state!r}")
        self._step = self._read = step
        self._ready: deque[Task] = deque()
        self._planned = step // STEPS_PER_BLOCK  # the first block whose plans are not written
        self._batches: Iterator[Any] | None = None  # started by the first step that is asked for

    def close(self) -> None:
        """Ends the workers and removes the plans; the stream gives nothing after it."""
        self._batches = iter(())
        self._remove()

    def _pipeline(self, step: int) -> Iterator[Any]:
        reader = _EpisodeReader(self._images, self._directory, step)
        dataset = grain.MapDataset.source(reader)
        threads = grain.ReadOptions(num_threads=READ_AHEAD, prefetch_buffer_size=READ_AHEAD)
        if self._num_workers == 0:
            return iter(dataset.to_iter_dataset(threads))
        _parse_absl_flags()
        ahead = grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=1)
        few = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(dataset.to_iter_dataset(few).mp_prefetch(ahead))

    def _plan_ahead(self) -> None:
        """The next step's block of plans, and the one after it, are there before it is read."""
        while self._planned <= self._read // STEPS_PER_BLOCK + 1:
            self._write_plans(self._planned)
            for name in Plan._fields:
                _plan_file(self._directory, name, self._planned - 3).unlink(missing_ok=True)
            self._planned += 1

    def _write_plans(self, block: int) -> None:
        """Those of a block of steps, which are the same whenever they are drawn."""
        files_of = [_plan_file(self._directory, name, block) for name in Plan._fields]
        if all(path.exists() for path in files_of):
            return
        # On the host, where the plans are needed.
        key = jax.device_put(self._key, jax.local_devices(backend="cpu")[0])
        sizes = self._images.starts, self._images.sizes
        plans = _plan_block(self._episode, *sizes, key, block * STEPS_PER_BLOCK)
        for path, leaf in zip(files_of, plans, strict=True):
            with files.atomic_write(path) as file:  # readers may look at any time
                np.save(file, np.asarray(leaf)[:, self._part.start : self._part.stop])

    def _put(self, step: int) -> Task:
        self._plan_ahead()
        if self._batches is None:
            self._batches = self._pipeline(step)
        images, rotations = next(self._batches)
        key = jax.random.fold_in(self._key, step)
        return _finish(self._episode, self._part, images, rotations, key)


class _EpisodeReader:
    """grain's random-access source: the images of a step, and how they turn."""

    def __init__(self, images: Images, directory: str, first_step: int):
        self.images, self.directory, self.first_step = images, directory, first_step

    def __len__(self) -> int:
        return MAX_STEPS - self.first_step

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        block, place = divmod(self.first_step + int(index), STEPS_PER_BLOCK)
        examples, rotations = (
            np.load(_plan_file(self.directory, name, block), mmap_mode="r")[place]
            for name in Plan._fields
        )
        return self.images.read(examples), np.array(rotations)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(first_step={self.first_step})"


def _plan_file(directory: str, name: str, block: int) -> Path:
    return Path(directory, f"{name}-{block}.npy")


def sampler(
    images: Images,
    *,
    key: Array,
    num_tasks: int,
    way: int,
    shot: int,
    query: int,
    rotate: bool = False,
    augment: Augment = augmenting.NONE,
    num_workers: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Stream:
    """Episodes read from disk: at step i those that `pools.sampler` gives for `fold_in(key, i)`.

    Memory does not grow with the data set: some steps' images are read ahead, and two steps' tasks
    lie on the device.

    Args:
        images: one split of classes, see `jaxmaml.data.sources.images`.
        key: a typed PRNG key.
        num_tasks: tasks per step, of all processes together.
        way, shot, query, rotate, augment: see `pools.sampler`.
        num_workers: processes that read and decode; 0 reads in threads of this one, which suits
            decoded images in the cache and two cores.
        process_index, process_count: of how many processes this is which, where several train
            together; it reads its own tasks only. None is as JAX says.

    Returns:
        An endless iterator of `Task`, which `jaxmaml.fit` takes as its source.

    Raises:
        ValueError: settings that the images do not allow, or `num_tasks` that the processes do not
            divide. What is wrong with a record is raised when it is read, with its file and number.

    >>> from jaxmaml.data import images
    >>> stored = images.from_arrays(np.zeros((40, 8, 8, 1), np.uint8), np.arange(40) % 4, "abcd")
    >>> with sampler(
    ...     stored, key=jax.random.key(0), num_tasks=3, way=2, shot=1, query=5
    ... ) as tasks:
    ...     next(tasks).query["inputs"].shape, tasks.get_state()
    ((3, 10, 8, 8, 1), {'step': 1})
    """
    episode = Episode(
        num_tasks=num_tasks, way=way, shot=shot, query=query, rotate=rotate, augment=augment
    )
    episodes.check(episode, images.sizes, images.names, images.shape)
    if num_workers < 0:
        raise ValueError(f"num_workers must not be negative, got {num_workers}")
    part = _share(num_tasks, process_index, process_count)
    return Stream(images, episode, key, num_workers, part)


def _share(num_tasks: int, index: int | None, count: int | None) -> range:
    index = jax.process_index() if index is None else index
    count = jax.process_count() if count is None else count
    if not 0 <= index < count:
        raise ValueError(f"process_index must be from 0 to process_count - 1, got {index}, {count}")
    if num_tasks % count:
        raise ValueError(f"num_tasks={num_tasks} must be divided by the {count} processes")
    size = num_tasks // count
    return range(index * size, (index + 1) * size)


@functools.partial(jax.jit, static_argnums=0)
def _plan_block(episode: Episode, starts: Any, sizes: Any, key: Array, first: Any) -> Plan:
    """Leaves `[STEPS_PER_BLOCK, num_tasks, ...]`."""
    steps = first + jnp.arange(STEPS_PER_BLOCK)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(steps)
    return jax.lax.map(functools.partial(episodes.plan_step, episode, starts, sizes), keys)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _finish(episode: Episode, part: range, images: Array, rotations: Array, key: Array) -> Task:
    keys = jax.random.split(key, episode.num_tasks)[part.start : part.stop]
    return episodes.to_tasks(episode, images, rotations, keys)


def _parse_absl_flags() -> None:
    """grain's workers refuse to start where a program has not parsed absl's flags."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
