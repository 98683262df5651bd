"""Options, timing, memory, tables, rows and works that several benchmarks share.

This module needs only jax, flax, optax and NumPy, so that the benchmarks run on a machine without
tensorflow-datasets, tyro or a network.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmaml import nn
from jaxmaml.experiments.provenance import git
from jaxmaml.types import LossFn, Params, Task

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MIB = 2**20


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
        run: makes one call and blocks until its result is there.
        temp_bytes: XLA's temporary memory.
    """

    run: Callable[[], Any]
    temp_bytes: int


class Quick(argparse.Action):
    """The option --quick: small sizes, and programs whose compilation takes less than half the time.

    Nearly all of the time of such a run goes into compiling programs that run for a moment.
    """

    def __init__(self, option_strings: Sequence[str], dest: str):
        text = "small sizes, little optimized: a check, not a measurement"
        super().__init__(option_strings, dest, nargs=0, default=False, help=text)

    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: object) -> None:
        """Sets the option, and how JAX compiles."""
        setattr(namespace, self.dest, True)
        jax.config.update("jax_disable_most_optimizations", True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the options of every benchmark, described by a script's docstring."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, help="file to append rows to, one JSON object per line")
    made.add_argument("--quick", action=Quick)
    made.add_argument(
        "--resume", action="store_true",
        help="leave out what --out holds from this commit and device",
    )  # fmt: skip
    return made


def use_all_cores() -> None:
    """Makes one CPU device per core, over which tasks are spread. Call it before anything runs."""
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def environment() -> dict[str, Any]:
    """Returns where a row was measured: commit, versions, device and command."""
    versions = {name: _version(name) for name in ("jax", "jaxlib", "flax", "optax", "torch")}
    return {
        "commit": commit(ROOT),
        "versions": {name: found for name, found in versions.items() if found},
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


@functools.cache
def commit(checkout: Path) -> str | None:
    """Returns the commit of a checkout as this process first saw it; None without git.

    It ends in "-dirty" if files were changed, other than the results: a row does not change what the
    next one measures.
    """
    name = git(checkout, "rev-parse", "--short=12", "HEAD")
    tracked = ("status", "--porcelain", "--untracked-files=no")
    changed = git(checkout, *tracked, "--", ".", ":!benchmarks/results", ":!benchmarks/README.md")
    return f"{name}-dirty" if name and changed else name


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class Rows:
    """The rows of one table, each appended to a file as soon as it is measured.

    Args:
        options: a command line with the options of `parser`.
        labels: what every row starts with, such as the name of its table. Each row ends with its
            environment.

    Raises:
        SystemExit: the file cannot be written, which hours of work would find out too late; or --quick
            with a file of the results, to which a check does not belong.
    """

    def __init__(self, options: argparse.Namespace, **labels: Any):
        if options.quick and options.out and RESULTS in options.out.resolve().parents:
            print(f"--quick is a check, not a measurement: not to {options.out}", file=sys.stderr)
            raise SystemExit(2)
        if options.out:
            _check_writable(options.out)
        self._out, self._labels = options.out, {**labels, "quick": options.quick}
        self._held: list[dict[str, Any]] = []
        if options.resume and self._out is not None and self._out.is_file():
            self._held = _whole_rows(self._out)

    def of(self, case: dict[str, Any], measure: Callable[[], Any]) -> list[dict[str, Any]]:
        """Returns the rows of a case, measured now, or read from the file with `--resume`.

        Args:
            case: what distinguishes these rows from others of the table; they start with it.
            measure: returns a row, or the rows, without `case`.
        """
        start, here = self._labels | case, environment()
        same = start | {name: here[name] for name in ("commit", "device")}
        held = [row for row in self._held if all(row.get(name) == same[name] for name in same)]
        if held:
            return held
        found = measure()
        rows = [start | row for row in (found if isinstance(found, list) else [found])]
        if self._out is not None:
            lines = "".join(json.dumps(row | here) + "\n" for row in rows)
            with self._out.open("a+b") as file:
                # A process that was killed may have left a part of a row.
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                is_whole = file.read() in (b"", b"\n")
                file.write((lines if is_whole else "\n" + lines).encode())
        return rows


def _check_writable(path: Path) -> None:
    """Makes the directory of a file, and ends the process with a line if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        print(f"--out {path} cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file; a process that was killed may have left a part of one."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Prints some columns of rows as a Markdown table, as README.md has them."""
    texts = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *texts, strict=True)]
    lines = [columns, ["-" * width for width in widths], *texts]
    for line in lines:
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        print("| " + " | ".join(padded) + " |")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "-" if value is None else str(value)


def alternate(
    sides: Mapping[str, Callable[[], Any]], num_rounds: int, *, pause: float = 0.0
) -> dict[str, list[float]]:
    """Returns the seconds of each side in each round. The sides take turns: A B A B.

    Args:
        sides: calls that block until their result is there. Each runs once before the first round.
        num_rounds: turns of each side.
        pause: seconds to wait before each turn. The threads of another library may spin for a while
            after their work; the pause lets them fall asleep.
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name, run in sides.items():
            time.sleep(pause)
            seconds[name].append(seconds_of(run))
    return seconds


def seconds_of(run: Callable[[], Any]) -> float:
    """Returns the time of one call that blocks until its result is there."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median_ratio(seconds: Mapping[str, list[float]], numerator: str, denominator: str) -> float:
    """Returns the median over rounds of the ratio of two sides' times in the same round."""
    return statistics.median(ratios(seconds, numerator, denominator))


def ratios(seconds: Mapping[str, list[float]], numerator: str, denominator: str) -> list[float]:
    """Returns the ratio of two sides' times in each round."""
    pairs = zip(seconds[numerator], seconds[denominator], strict=True)
    return [a / b for a, b in pairs]


def compiled(function: Callable[..., Any], *args: Any) -> Compiled:
    """Compiles a function for some arguments; shapes will do if it is not run."""
    program = jax.jit(function).lower(*args).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    return Compiled(lambda: jax.block_until_ready(program(*args)), analysis.temp_size_in_bytes)


def num_bytes(tree: Any) -> int:
    """Returns the size of a pytree of arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def growth_per_step(
    before: Mapping[str, int], after: Mapping[str, int], num_steps: int, unit: int
) -> dict[str, float]:
    """Returns by how much the memory of each side grows per inner step.

    Args:
        before: bytes of each side with some number of inner steps.
        after: bytes of each side with `num_steps` more inner steps; sides may be missing.
        num_steps: the number of added steps.
        unit: bytes of one unit of the result.
    """
    return {name: (after[name] - before[name]) / num_steps / unit for name in after}


def matmul_rate(size: int = 2048) -> float:
    """Returns the FLOP/s of a large float32 matrix product: the limit on this machine."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    run = compiled(jnp.dot, a, a).run
    return 2 * size**3 / min(alternate({"dot": run}, 10)["dot"])


def conv4(
    way: int = 5,
    *,
    pooled: bool = False,
    image_shape: tuple[int, int, int] = (28, 28, 1),
    **options: Any,
) -> tuple[LossFn, Params]:
    """Returns (loss_fn, params) of Conv4."""
    module = nn.Conv4(way, pooled=pooled, image_shape=image_shape, rngs=nnx.Rngs(0), **options)
    apply_fn, params = nn.from_nnx(module)
    return nn.cross_entropy(apply_fn), params


def image_tasks(
    num_tasks: int, way: int, shot: int, query: int, image_shape: tuple[int, ...] = (28, 28, 1)
) -> Task:
    """Returns tasks of random images: the cost of a step does not depend on what they show."""
    rng = np.random.default_rng(0)

    def batch(num_per_class: int) -> dict[str, Any]:
        inputs = rng.normal(size=(num_tasks, way * num_per_class, *image_shape))
        targets = np.tile(np.repeat(np.arange(way), num_per_class), (num_tasks, 1))
        return {
            "inputs": jnp.asarray(inputs, jnp.float32),
            "targets": jnp.asarray(targets, jnp.int32),
        }

    return Task(batch(shot), batch(query))
