"""Time of an outer step: works, exact and first order, chunk sizes, one device and all cores.

    python benchmarks/speed.py --out speed.jsonl
    python benchmarks/speed.py --work conv-1q --against ../other-checkout

Three tables. Steps: ms and GFLOP/s of the jitted meta-gradient, beside the rate of a large matrix
product on this machine. Order: (exact / first-order time) over (exact / first-order FLOPs of an ideal
implementation); 1 means that the exact gradient costs no more than its arithmetic. Loop: the time of
a step of the training loop, sampling included, over that of a jitted `meta_step` on fixed tasks.

With `--against`, another checkout of this repository does the same works, the two in turn, and there
is one table: the time with this checkout over the time with the other one.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import against
import common
import jax
import peer_works
from jax.sharding import Mesh

import jaxmaml
from jaxmaml import parallel
from jaxmaml.batching import ChunkSize
from jaxmaml.experiments.presets import Preset
from jaxmaml.types import MetaState, Task

ORDERS = ("exact", "first")
COLUMNS = {
    "step": [
        *("work", "order", "chunk_size", "devices", "ms", "gflop", "gflop_per_s", "of_limit"),
        "mib",
    ],
    "order": ["work", "chunk_size", "devices", "time_ratio", "ideal_flop_ratio", "ratio"],
    "loop": ["work", "order", "devices", "loop_ms", "bare_ms", "ratio"],
}
"""The printed columns of each table."""
QUICK_WORKS = ("conv-1q", "sinusoid")
GFLOP_PER_DISPATCH = 100
"""The loop table makes this many GFLOP per dispatch: a second or so."""


def main() -> None:
    """Times the chosen works."""
    args = _options()
    rounds = args.rounds or (2 if args.quick else 11)
    if args.against is not None:
        _compare_checkouts(args, rounds)
        return

    # The limit on this machine.
    common.use_all_cores()
    limit = common.matmul_rate(256 if args.quick else 2048) / 1e9
    print(f"a large float32 matrix product runs at {limit:.0f} GFLOP/s here")

    # Each work.
    rows: list[dict[str, Any]] = []
    for work in args.work:
        preset = peer_works.PRESETS[work]
        preset = peer_works.shrink(preset) if args.quick else preset
        rows += _measure(work, preset, rounds, limit, args)
        print(f"{work} done", flush=True)
    for table, columns in COLUMNS.items():
        print()
        common.print_table([row for row in rows if row["table"] == table], columns)


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--work", nargs="+", choices=peer_works.PRESETS, help="defaults to all, or two with --quick"
    )
    parser.add_argument("--rounds", type=int, help="defaults to 11, or 2 with --quick")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="another checkout of this repository"
    )
    args = parser.parse_args()
    args.work = args.work or list(QUICK_WORKS if args.quick else peer_works.PRESETS)
    return args


def _compare_checkouts(args: argparse.Namespace, rounds: int) -> None:
    rows, other = common.Rows(args, table="against"), common.commit(args.against)
    for work in args.work:
        measure = functools.partial(_compared, args.against, work, rounds, quick=args.quick)
        found = rows.of({"work": work, "other_commit": other}, measure)
        common.print_table(found, against.COLUMNS)


def _compared(other: Path, work: str, rounds: int, *, quick: bool) -> list[dict[str, Any]]:
    """Returns the rows of `against.compare`, or one with the reason for having none."""
    try:
        return against.compare(other, work, rounds, quick=quick)
    except ValueError as error:
        return [{"work": work, "reason": str(error)}]


def _measure(
    work: str, preset: Preset, rounds: int, limit: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Returns the rows of one work, of all tables."""
    # Steps, and the ratio of the two orders.
    rows: list[dict[str, Any]] = []
    for mesh, chunk_size in _variants(preset, args.quick):
        case = {"work": work, "chunk_size": chunk_size or "all", "devices": mesh.size}
        measure = functools.partial(_step_rows, preset, mesh, chunk_size, rounds, limit)
        pair = common.Rows(args, table="step").of(case, measure)
        rows += pair
        if preset.model == "conv":
            ratio = functools.partial(_order_row, pair)
            rows += common.Rows(args, table="order").of(case, ratio)

    if args.quick and preset.model == "conv":
        return rows  # the loop is checked with a network that compiles at once

    # The training loop.
    every = parallel.make_mesh()
    for order in ORDERS:
        case = {"work": work, "order": order, "devices": every.size}
        measure = functools.partial(_loop_row, preset, order, every, rounds, args.quick)
        rows += common.Rows(args, table="loop").of(case, measure)
    return rows


def _variants(preset: Preset, quick: bool) -> list[tuple[Mesh, ChunkSize]]:
    """Returns (devices, chunk size): one device, and all devices with ever larger chunks.

    With `quick` it is all devices with the default chunks only.
    """
    one = parallel.make_mesh(1)
    every = parallel.make_mesh()
    if quick:
        return [(every, "auto")]
    variants: list[tuple[Mesh, ChunkSize]] = [(every, "auto")]
    if every.size > 1:
        variants = [(one, "auto"), *variants]
    if preset.num_tasks // every.size > 4:
        variants.append((every, 4))
    return [*variants, (every, None)]


def _step_rows(
    preset: Preset, mesh: Mesh, chunk_size: ChunkSize, rounds: int, limit: float
) -> list[dict[str, Any]]:
    """Returns the rows of exact and first order, timed in turn; both have the ratio of their times."""
    # Compile and time both orders.
    problems = {order: peer_works.build(preset, order) for order in ORDERS}
    programs = {
        order: common.compiled(
            peer_works.gradient(problem, mesh, chunk_size), *peer_works.place(problem, mesh)
        )
        for order, problem in problems.items()
    }
    seconds = common.alternate({order: made.run for order, made in programs.items()}, rounds)

    # One row per order.
    ratio, rows = common.median_ratio(seconds, *ORDERS), []
    for order, problem in problems.items():
        median, gflop = statistics.median(seconds[order]), peer_works.gflop(problem)
        rows.append({
            **peer_works.options(preset), "order": order, "ms": 1e3 * median, "gflop": gflop,
            "ideal_gflop": peer_works.ideal_gflop(problem, order),
            "gflop_per_s": gflop / median, "limit_gflop_per_s": limit,
            "of_limit": gflop / median / limit, "mib": programs[order].temp_bytes / common.MIB,
            "time_ratio": ratio,
        })  # fmt: skip
    return rows


def _order_row(pair: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the row of the ratio of exact and first order, from the rows of `_step_rows`."""
    exact, first = pair
    ratio, ideal = exact["time_ratio"], exact["ideal_gflop"] / first["ideal_gflop"]
    return {"time_ratio": ratio, "ideal_flop_ratio": ideal, "ratio": ratio / ideal}


def _loop_row(preset: Preset, order: str, mesh: Mesh, rounds: int, quick: bool) -> dict[str, Any]:
    """Returns the row of a dispatch of the training loop, beside as many calls of `meta_step`."""
    problem = peer_works.build(preset, order)
    num_steps = _num_steps(problem, quick)
    sides = {
        "loop": peer_works.training_loop(problem, mesh, num_steps),
        "bare": _bare(problem, mesh, num_steps),
    }
    seconds = common.alternate(sides, rounds)
    per_step = {name: 1e3 * statistics.median(found) / num_steps for name, found in seconds.items()}
    return {
        **peer_works.options(preset),
        "num_steps": num_steps, "loop_ms": per_step["loop"], "bare_ms": per_step["bare"],
        "ratio": common.median_ratio(seconds, "loop", "bare"),
    }  # fmt: skip


def _num_steps(problem: peer_works.Problem, quick: bool) -> int:
    """Returns the number of steps per dispatch, 2 to 500."""
    if quick:
        return 2
    return max(2, min(500, round(GFLOP_PER_DISPATCH / peer_works.gflop(problem))))


def _bare(problem: peer_works.Problem, mesh: Mesh, num_steps: int) -> Callable[[], Any]:
    """Returns a call that makes outer steps on fixed tasks, one program per step."""
    _, tasks = peer_works.place(problem, mesh)
    meta_state = peer_works.init_state(problem, mesh)
    optimizer = peer_works.optimizer(problem.preset)
    used = mesh if mesh.size > 1 else None

    def meta_step(meta_state: MetaState, tasks: Task) -> Any:
        return jaxmaml.meta_step(
            problem.learner, optimizer, meta_state, tasks, mesh=used, chunk_size=problem.chunk_size
        )

    program = jax.jit(meta_step).lower(meta_state, tasks).compile()

    def run() -> Any:
        stepped = meta_state
        for _ in range(num_steps):
            # One step at a time: CPU devices that wait for each other in two programs can hang.
            stepped, _ = jax.block_until_ready(program(stepped, tasks))
        return stepped

    return run


if __name__ == "__main__":
    main()
