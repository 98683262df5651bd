"""Episodes from the device and from disk: their speed, alone and beside training, and their memory.

    python benchmarks/episodes.py --data-dir DIR --out episodes.jsonl

Three tables. Sampling alone, in tasks per second. A training loop fed by the pool on the device and by
the stream, in turn A B A B: `ratio` is the stream's time over the pool's. Peak anonymous memory of a
process that streams a dataset once and ten times as large. (The page cache, which holds the pages of a
mapped file, does not count: the system can take it back.) DIR is a TFDS data directory with omniglot
and cifar100 as ArrayRecord; this script needs tensorflow-datasets and grain.
"""

import argparse
import dataclasses
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np

from jaxmaml import fitting, sources
from jaxmaml.data import datasets, pools, stream
from jaxmaml.data.image_cache import Cache
from jaxmaml.data.stored_images import Images
from jaxmaml.experiments import presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import build_candidate, build_experiment, init_state
from jaxmaml.experiments.presets import Preset
from jaxmaml.experiments.tasks import Streaming
from jaxmaml.types import Task

WORKS = {"omniglot": "omniglot-5w1s", "cifar-fs": "cifar-fs-5w1s"}
"""The preset whose episodes are drawn, by dataset."""
TABLES = ("sampling", "training", "memory")
FEEDS = {"pool": None, "stream, cached": Streaming(), "stream, decoded": Streaming(cache=False)}
"""How training reads its images."""
NUM_WARM_UP = 4
"""Steps before sampling is timed."""
COPIES = 10
"""How many times the dataset is repeated for the memory table."""
NUM_STREAMED = 600
"""Steps that the memory table streams, of tasks of any dataset."""


def main() -> None:
    """Prints and appends the three tables."""
    args = _options()
    common.use_all_cores()
    if args.stream_only:
        print(_peak_of_streaming(args.stream_only))
        return
    for dataset in args.dataset:
        for table in args.table:
            measure = lambda table=table, dataset=dataset: list(_rows(table, dataset, args))
            case = {"table": table, "dataset": dataset}
            rows = common.Rows(args).of(case, measure)
            here = {"quick", *common.environment()}
            common.print_table(rows, [name for name in rows[0] if name not in here])
            print()


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--dataset", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--stream-only", type=Path, help="cache file, for the processes of the memory table"
    )
    return parser.parse_args()


def _rows(table: str, dataset: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if table == "sampling":
        return _sampling(dataset, args.data_dir, args.workers, quick=args.quick)
    if table == "training":
        return _training(dataset, args.data_dir, args.rounds, quick=args.quick)
    return _memory(dataset, args.data_dir)


def _sampling(
    dataset: str, data_dir: Path, workers: list[int], *, quick: bool
) -> Iterator[dict[str, Any]]:
    """Yields a row per source and number of workers."""
    preset = presets.get(WORKS[dataset])
    settings = {
        "num_tasks": preset.num_tasks, "way": preset.way, "shot": preset.shot,
        "query": preset.query, "rotate": preset.rotate_train,
    }  # fmt: skip
    num_steps = 1 if quick else 96 if dataset == "omniglot" else 16
    key = jax.random.key(0)
    decoded = datasets.images(dataset, data_dir, cache=False)["train"]
    cached = datasets.images(dataset, data_dir, cache=True)["train"]

    # From the device.
    pool = pools.sampler(pools.from_images(cached), **settings)
    tasks = sources.batches(pool, key)
    yield _rate_row(dataset, preset, "pool", None, tasks, num_steps)

    # From disk.
    for name, images in (("stream, cached", cached), ("stream, decoded", decoded)):
        for num_workers in workers:
            with stream.sampler(images, num_workers=num_workers, **settings).start(key) as tasks:
                yield _rate_row(dataset, preset, name, num_workers, tasks, num_steps)


def _rate_row(
    dataset: str,
    preset: Preset,
    source: str,
    num_workers: int | None,
    tasks: Iterable[Task],
    num_steps: int,
) -> dict[str, Any]:
    # Workers start and programs compile before the clock does.
    for batch in itertools.islice(tasks, NUM_WARM_UP):
        jax.block_until_ready(batch)
    start = time.perf_counter()
    for batch in itertools.islice(tasks, num_steps):
        jax.block_until_ready(batch)
    seconds = time.perf_counter() - start
    return {
        "table": "sampling", "dataset": dataset, "source": source, "workers": num_workers,
        "images_per_task": preset.way * (preset.shot + preset.query),
        "ms_per_step": 1e3 * seconds / num_steps,
        "tasks_per_s": num_steps * preset.num_tasks / seconds,
    }  # fmt: skip


def _training(
    dataset: str, data_dir: Path, rounds: int, *, quick: bool
) -> Iterator[dict[str, Any]]:
    """Yields a row per feed of the training loop, timed in turn."""
    preset = presets.get(WORKS[dataset])
    if quick:
        preset = presets.override(preset, num_filters=4, num_tasks=2)
    num_steps = 3 if quick else 40 if dataset == "omniglot" else 3
    sides = {name: _trainer(preset, data_dir, feed, num_steps) for name, feed in FEEDS.items()}
    seconds = common.alternate(sides, 2 if quick else rounds)
    for name, found in seconds.items():
        yield {
            "table": "training", "dataset": dataset, "preset": preset.name, "source": name,
            "workers": 0, "num_steps": num_steps,
            "ms_per_step": 1e3 * statistics.median(found) / num_steps,
            "tasks_per_s": preset.num_tasks * num_steps / statistics.median(found),
            "ratio": common.median_ratio(seconds, name, "pool"), "quick": quick,
        }  # fmt: skip


def _trainer(
    preset: Preset, data_dir: Path, feed: Streaming | None, num_steps: int
) -> Callable[[], Any]:
    """Returns a call that trains for `num_steps` outer steps and blocks."""
    preset = dataclasses.replace(preset, num_outer_steps=num_steps)
    experiment = build_experiment(
        preset, seed=0, num_test_tasks=1, data_dir=data_dir, streaming=feed
    )
    candidate = build_candidate(experiment, Spec("exact", "exact", preset.inner_lr))
    meta_state = init_state(experiment, candidate)
    program = fitting.compile_program(
        candidate.learner, experiment.optimizer, meta_state, experiment.sources["train"],
        key=experiment.train_key, chunk_size=candidate.chunk_size,
        num_steps_per_dispatch=num_steps, mesh=experiment.mesh,
    )  # fmt: skip
    states = fitting.States(meta_state, meta_state)
    return lambda: jax.block_until_ready(program.run(states, num_steps)[0])


def _memory(dataset: str, data_dir: Path) -> Iterator[dict[str, Any]]:
    """Yields a row for a process that streams the dataset, once and repeated."""
    cached = datasets.images(dataset, data_dir, cache=True)["train"]
    with tempfile.TemporaryDirectory() as directory:
        for copies in (1, COPIES):
            file = Path(directory, f"{copies}.npy")
            _write_copies(cached, copies, file)
            command = [sys.executable, __file__, "--data-dir", ".", "--stream-only", str(file)]
            ran = subprocess.run(command, check=True, capture_output=True, text=True)
            yield {
                "table": "memory", "dataset": dataset, "times": copies,
                "file_mib": file.stat().st_size / common.MIB,
                "peak_anonymous_mib": float(ran.stdout),
            }  # fmt: skip


def _write_copies(images: Images, copies: int, file: Path) -> None:
    """Writes a cache file with all images several times, and the sizes of its classes beside it."""
    pixels = images.read(np.arange(len(images.numbers)))
    np.save(file, np.concatenate([pixels] * copies))
    np.save(file.with_suffix(".sizes.npy"), np.tile(images.sizes, copies))


def _peak_of_streaming(path: Path) -> float:
    """Returns the peak MiB of anonymous memory while tasks are streamed from a cache file."""
    # The images of the file.
    sizes = np.load(path.with_suffix(".sizes.npy"))
    num_images, *shape = np.load(path, mmap_mode="r").shape
    height, width, channels = shape
    images = Images(
        starts=(np.cumsum(sizes) - sizes).astype(np.int32),
        sizes=sizes,
        names=tuple(map(str, range(len(sizes)))),
        numbers=np.arange(num_images),
        reader=Cache(path, num_images, (height, width, channels)),
    )

    # Stream them.
    peak = 0.0
    source = stream.sampler(images, num_tasks=32, way=5, shot=1, query=15)
    with source.start(jax.random.key(0)) as tasks:
        for step, batch in zip(range(NUM_STREAMED), tasks, strict=False):
            jax.block_until_ready(batch)
            if step % 20 == 0:
                peak = max(peak, _anonymous_mib())
    return peak


def _anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith("RssAnon"))
    return int(kib) / 1024


if __name__ == "__main__":
    main()
