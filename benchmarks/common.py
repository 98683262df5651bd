"""What every benchmark shares: work to do, timing side by side, and rows that say where they come from.

Nothing here needs more than jax, flax, optax and NumPy, so that the scripts run on a machine that has
no tensorflow-datasets, tyro or network.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmaml import nn
from jaxmaml.types import Task

ROOT = Path(__file__).parents[1]


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, help="file that rows are appended to, one JSON line each")
    made.add_argument(
        "--quick", action="store_true", help="small sizes: a check, not a measurement"
    )
    return made


def use_all_cores() -> None:
    """One CPU device a core, over which `jaxmaml.parallel` spreads tasks; before anything runs."""
    jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def environment() -> dict[str, Any]:
    """Where a row was measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    versions = {name: _version(name) for name in ("jax", "jaxlib", "flax", "optax", "torch")}
    return {
        "commit": commit.stdout.strip() or None,
        "versions": {name: found for name, found in versions.items() if found},
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def emit(rows: list[dict[str, Any]], out: Path | None) -> None:
    """Appends rows, each with its environment, to `out`."""
    if out is None:
        return
    with out.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **environment()}) + "\n")


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Rows as a Markdown table, ready for README.md."""
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
    sides: dict[str, Callable[[], Any]], num_rounds: int, *, pause: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each side in each round, the sides in turn A B A B, after one round unmeasured.

    A side blocks until its result is there. Threads of another library may go on spinning for
    work after that: `pause` seconds before each turn let them fall asleep.
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name, run in sides.items():
            time.sleep(pause)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: dict[str, list[float]], numerator: str, denominator: str) -> float:
    """Median over rounds of the ratio of two sides' times in the same round."""
    pairs = zip(seconds[numerator], seconds[denominator], strict=True)
    return statistics.median(a / b for a, b in pairs)


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[[], Any], int]:
    """(a call that blocks until done, XLA's temporary memory in bytes)."""
    program = jax.jit(function).lower(*args).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    return lambda: jax.block_until_ready(program(*args)), analysis.temp_size_in_bytes


def matmul_rate(size: int = 2048) -> float:
    """FLOP/s of a large float32 matrix product here: the limit that figures are held against."""
    a = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    run, _ = compiled(jnp.dot, a, a)
    return 2 * size**3 / min(alternate({"dot": run}, 10)["dot"])


def conv4(
    way: int = 5,
    *,
    pooled: bool = False,
    image_shape: tuple[int, int, int] = (28, 28, 1),
    **options: Any,
) -> tuple[Any, Any]:
    """(loss_fn, params) of Conv4."""
    module = nn.Conv4(way, pooled=pooled, image_shape=image_shape, rngs=nnx.Rngs(0), **options)
    apply_fn, params, _ = nn.from_nnx(module)
    return nn.cross_entropy(apply_fn), params


def image_tasks(
    num_tasks: int, way: int, shot: int, query: int, image_shape: tuple[int, ...] = (28, 28, 1)
) -> Task:
    """Random images: the cost of a step does not depend on what they show."""
    rng = np.random.default_rng(0)

    def batch(num: int) -> dict[str, Any]:
        inputs = rng.normal(size=(num_tasks, way * num, *image_shape))
        targets = np.tile(np.repeat(np.arange(way), num), (num_tasks, 1))
        return {
            "inputs": jnp.asarray(inputs, jnp.float32),
            "targets": jnp.asarray(targets, jnp.int32),
        }

    return Task(batch(shot), batch(query))
