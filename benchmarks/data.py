"""Episodes from the device and from disk: how fast, beside training, and in how much memory.

    python benchmarks/data.py --data-dir DIR --out data.jsonl

Three tables. Sampling alone, in tasks a second. A training loop fed by the device pool and by the
stream, in turn A B A B: `ratio` is the stream's time over the pool's. Peak anonymous memory (the page
cache, where a mapped file's pages lie, is the system's to take back) of a process that streams a data
set once and ten times over. DIR is a TFDS data directory with omniglot and cifar100 as ArrayRecord;
this script needs tensorflow-datasets and grain.
"""

import dataclasses
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
from jaxmaml.data.images import Cache, Images
from jaxmaml.train import experiment, loop, presets
from jaxmaml.train.experiment import Spec, Streaming

from jaxmaml.data import pools, sources, stream

WORKS = {"omniglot": "omniglot-5w1s", "cifar-fs": "cifar-fs-5w1s"}
"""The preset whose episodes are drawn, by data set."""

TABLES = ("sampling", "training", "memory")

COPIES = 10
"""How many times the data set is concatenated for the memory table."""


def main() -> None:
    """Prints the three tables."""
    parser = common.parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--dataset", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--table", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream-only", type=Path, help="what the memory table runs: a cache file")
    args = parser.parse_args()
    common.use_all_cores()
    if args.stream_only:
        print(_peak_of_streaming(args.stream_only))
        return
    for dataset in args.dataset:
        for table in args.table:
            rows = list(_rows(table, dataset, args))
            common.emit(rows, args.out)
            common.print_table(rows, list(rows[0]))
            print()


def _rows(table: str, dataset: str, args: Any) -> Any:
    if table == "sampling":
        return _sampling(dataset, args.data_dir, args.workers, quick=args.quick)
    if table == "training":
        return _training(dataset, args.data_dir, args.rounds, quick=args.quick)
    return _memory(dataset, args.data_dir)


def _sampling(dataset: str, data_dir: Path, workers: list[int], *, quick: bool) -> Any:
    preset = presets.get(WORKS[dataset])
    settings = {
        "num_tasks": preset.num_tasks, "way": preset.way, "shot": preset.shot,
        "query": preset.query, "rotate": preset.rotate_train,
    }  # fmt: skip
    num_steps = 5 if quick else 100 if dataset == "omniglot" else 20
    decoded = sources.images(dataset, data_dir, cache=False)["train"]
    cached = sources.images(dataset, data_dir, cache=True)["train"]
    sample = jax.jit(pools.sampler(pools.from_images(cached), **settings))
    keys = jax.random.split(jax.random.key(0), num_steps)
    yield _rate(dataset, preset, "pool", None, (sample(key) for key in keys), num_steps)
    for name, stored in (("stream, cached", cached), ("stream, decoded", decoded)):
        for num_workers in workers:
            with stream.sampler(
                stored, key=jax.random.key(0), num_workers=num_workers, **settings
            ) as tasks:
                yield _rate(dataset, preset, name, num_workers, tasks, num_steps)


def _rate(
    dataset: str, preset: Any, source: str, num_workers: int | None, tasks: Any, num_steps: int
) -> dict[str, Any]:
    """Tasks a second after the first few, which start workers and compile."""
    for batch in itertools.islice(tasks, 4):
        jax.block_until_ready(batch)
    start = time.perf_counter()
    count = 0
    for batch in itertools.islice(tasks, num_steps - 4):
        jax.block_until_ready(batch)
        count += 1
    seconds = time.perf_counter() - start
    return {
        "table": "sampling", "dataset": dataset, "source": source, "workers": num_workers,
        "images_per_task": preset.way * (preset.shot + preset.query),
        "ms_per_step": 1e3 * seconds / count, "tasks_per_s": count * preset.num_tasks / seconds,
    }  # fmt: skip


def _training(dataset: str, data_dir: Path, rounds: int, *, quick: bool) -> Any:
    """A step of training from the pool, from the cached stream, and from the stream that decodes."""
    preset = presets.get(WORKS[dataset])
    if quick:
        preset = presets.override(preset, num_filters=4, num_tasks=2)
    num_steps = 3 if quick else 40 if dataset == "omniglot" else 3
    feeds = {
        "pool": None,
        "stream, cached": Streaming(),
        "stream, decoded": Streaming(cache=False),
    }
    sides = {name: _trainer(preset, data_dir, feed, num_steps) for name, feed in feeds.items()}
    seconds = common.alternate(sides, 2 if quick else rounds)
    for name, found in seconds.items():
        yield {
            "table": "training", "dataset": dataset, "preset": preset.name, "source": name,
            "workers": 0, "num_steps": num_steps,
            "ms_per_step": 1e3 * statistics.median(found) / num_steps,
            "tasks_per_s": preset.num_tasks * num_steps / statistics.median(found),
            "ratio": common.median_ratio(seconds, name, "pool"), "quick": quick,
        }  # fmt: skip


def _trainer(preset: Any, data_dir: Path, feed: Streaming | None, num_steps: int) -> Any:
    preset = dataclasses.replace(preset, num_outer_steps=num_steps)
    built = experiment.build(preset, seed=0, num_test_tasks=1, data_dir=data_dir, streaming=feed)
    spec = Spec("exact", "exact", preset.inner_lr)
    learner, state = experiment.learner(built, spec), experiment.init_state(built, spec)
    options: dict[str, Any] = {
        "chunk_size": experiment.chunk_size(preset),
        "num_steps_per_dispatch": num_steps,
        "mesh": built.mesh,
    }
    if feed is None:
        program = loop.compile_steps(
            learner, built.optimizer, state, built.sources["train"], key=built.train_key, **options
        )
    else:
        tasks = experiment.batches(built, "train", built.train_key)
        program = loop.compile_batches(learner, built.optimizer, state, tasks, **options)
    return lambda: jax.block_until_ready(program.run(state, num_steps)[0])


def _memory(dataset: str, data_dir: Path) -> Any:
    """Peak anonymous memory of a process that streams, beside one that only starts."""
    cached = sources.images(dataset, data_dir, cache=True)["train"]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "images.npy"
        np.save(path, cached.read(np.arange(len(cached.numbers))))
        np.save(path.with_suffix(".sizes.npy"), cached.sizes)
        many = path.with_name("many.npy")
        whole = np.concatenate([np.load(path, mmap_mode="r")] * COPIES)
        np.save(many, whole)
        del whole
        np.save(many.with_suffix(".sizes.npy"), np.tile(cached.sizes, COPIES))
        for copies, file in ((1, path), (COPIES, many)):
            command = [sys.executable, __file__, "--data-dir", ".", "--stream-only", str(file)]
            ran = subprocess.run(command, check=True, capture_output=True, text=True)
            yield {
                "table": "memory", "dataset": dataset, "times": copies,
                "file_mib": file.stat().st_size / 2**20, "peak_anonymous_mib": float(ran.stdout),
            }  # fmt: skip


def _peak_of_streaming(path: Path) -> float:
    """MiB of anonymous memory at most while tasks are streamed from a cache of images."""
    sizes = np.load(path.with_suffix(".sizes.npy"))
    shape = np.load(path, mmap_mode="r").shape
    stored = Images(
        (np.cumsum(sizes) - sizes).astype(np.int32), sizes, tuple(map(str, range(len(sizes)))),
        np.arange(shape[0]), Cache(path, shape[0], shape[1:]),
    )  # fmt: skip
    peak = 0.0
    settings: dict[str, Any] = {"num_tasks": 32, "way": 5, "shot": 1, "query": 15}
    with stream.sampler(stored, key=jax.random.key(0), **settings) as tasks:
        for step, batch in zip(range(600), tasks, strict=False):
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
