"""Time of an outer step: works, exact and first order, chunk sizes, one device and all cores.

    python benchmarks/speed.py --out speed.jsonl

Three tables. Steps: ms and GFLOP/s of the jitted meta-gradient, beside the rate of a large matrix
product here. Order: (exact / first-order time) over (exact / first-order FLOPs of an ideal
implementation); 1 is an exact gradient that costs no more than its arithmetic. Loop: a step of the
training loop, sampling included, over a jitted `meta_step` on tasks sampled before.
"""

import statistics
from collections.abc import Callable
from typing import Any

import common
import jax
import peer_works
from jax.sharding import Mesh
from jaxmaml.train import loop
from jaxmaml.train.presets import Preset

import jaxmaml
from jaxmaml import outer, parallel

ORDERS = ("exact", "first")
STEP_COLUMNS = [
    *("work", "order", "chunk_size", "devices", "ms", "gflop", "gflop_per_s", "of_limit", "mib"),
]
ORDER_COLUMNS = ["work", "chunk_size", "devices", "time_ratio", "ideal_flop_ratio", "ratio"]
LOOP_COLUMNS = ["work", "order", "devices", "loop_ms", "bare_ms", "ratio"]


def main() -> None:
    """Times the works asked for."""
    parser = common.parser((__doc__ or "").splitlines()[0])
    works = peer_works.PRESETS
    parser.add_argument("--work", nargs="+", choices=works, default=list(works))
    parser.add_argument(
        "--rounds", type=int, default=None, help="unless told 11, or 2 with --quick"
    )
    args = parser.parse_args()
    common.use_all_cores()
    rounds = args.rounds or (2 if args.quick else 11)
    limit = common.matmul_rate(256 if args.quick else 2048) / 1e9
    print(f"a large float32 matrix product runs at {limit:.0f} GFLOP/s here")
    tables: dict[str, list[dict[str, Any]]] = {"step": [], "order": [], "loop": []}
    for work in args.work:
        preset = works[work]
        preset = peer_works.shrink(preset) if args.quick else preset
        found = _measure(work, preset, rounds, limit, args.quick)
        for table, rows in found.items():
            common.emit([{"table": table, "quick": args.quick, **row} for row in rows], args.out)
            tables[table] += rows
        print(f"{work} done", flush=True)
    for table, columns in zip(tables, (STEP_COLUMNS, ORDER_COLUMNS, LOOP_COLUMNS), strict=True):
        print()
        common.print_table(tables[table], columns)


def _measure(
    work: str, preset: Preset, rounds: int, limit: float, quick: bool
) -> dict[str, list[dict[str, Any]]]:
    """Rows of one work, by table."""
    steps, orders = [], []
    for mesh, chunk_size in _variants(preset):
        pair, order = _step_rows(work, preset, mesh, chunk_size, rounds, limit)
        steps += pair
        orders += [order] if preset.model == "conv" else []
    every = parallel.task_mesh(preset.num_tasks)
    loops = [_loop_row(work, preset, order, every, rounds, quick) for order in ORDERS]
    return {"step": steps, "order": orders, "loop": loops}


def _variants(preset: Preset) -> list[tuple[Mesh, Any]]:
    """(devices, chunk size): one device, and as many as share the tasks with ever larger chunks."""
    one = parallel.task_mesh(preset.num_tasks, jax.devices()[:1])
    every = parallel.task_mesh(preset.num_tasks)
    chunk_sizes = ["auto", 4, None] if preset.num_tasks // every.size > 4 else ["auto", None]
    variants = [(every, chunk_size) for chunk_size in chunk_sizes]
    return [(one, "auto"), *variants] if every.size > 1 else variants


def _step_rows(
    work: str, preset: Preset, mesh: Mesh, chunk_size: Any, rounds: int, limit: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(a row each of exact and first order, the row of their ratio), timed in turn."""
    problems = {order: peer_works.build(preset, order) for order in ORDERS}
    sides, temp_bytes = {}, {}
    for order, problem in problems.items():
        gradient = peer_works.gradient(problem, mesh, chunk_size)
        placed = peer_works.place(problem, mesh)
        sides[order], temp_bytes[order] = common.compiled(gradient, *placed)
    seconds = common.alternate(sides, rounds)
    size = {"work": work, "chunk_size": chunk_size or "all", "devices": mesh.size}
    size |= peer_works.options(preset)
    rows = []
    for order, problem in problems.items():
        median, gflop = statistics.median(seconds[order]), peer_works.gflop(problem)
        rows.append({
            **size, "order": order, "ms": 1e3 * median, "gflop": gflop,
            "ideal_gflop": peer_works.ideal_gflop(problem, order),
            "gflop_per_s": gflop / median, "limit_gflop_per_s": limit,
            "of_limit": gflop / median / limit, "mib": temp_bytes[order] / 2**20,
        })  # fmt: skip
    ideal = rows[0]["ideal_gflop"] / rows[1]["ideal_gflop"]
    ratio = common.median_ratio(seconds, *ORDERS)
    order_row = {**size, "time_ratio": ratio, "ideal_flop_ratio": ideal, "ratio": ratio / ideal}
    return rows, order_row


def _loop_row(
    work: str, preset: Preset, order: str, mesh: Mesh, rounds: int, quick: bool
) -> dict[str, Any]:
    """A dispatch of the training loop against as many calls of a jitted meta_step."""
    problem = peer_works.build(preset, order)
    optimizer = peer_works.optimizer(preset)
    state = jaxmaml.init_state(problem.learner, optimizer, problem.params)
    state = parallel.replicate(state, mesh)
    num_steps = _num_steps(problem, quick)
    program = loop.compile_steps(
        problem.learner, optimizer, state, peer_works.source(preset), key=jax.random.key(0),
        chunk_size=problem.chunk_size, num_steps_per_dispatch=num_steps, mesh=mesh,
    )  # fmt: skip
    sides = {
        "loop": lambda: jax.block_until_ready(program.run(state, num_steps)),
        "bare": _bare(problem, optimizer, state, mesh, num_steps),
    }
    seconds = common.alternate(sides, rounds)
    per_step = {name: 1e3 * statistics.median(found) / num_steps for name, found in seconds.items()}
    return {
        "work": work, "order": order, "devices": mesh.size, **peer_works.options(preset),
        "num_steps": num_steps, "loop_ms": per_step["loop"], "bare_ms": per_step["bare"],
        "ratio": common.median_ratio(seconds, "loop", "bare"),
    }  # fmt: skip


def _num_steps(problem: peer_works.Problem, quick: bool) -> int:
    """Steps a dispatch: about 100 GFLOP of them, a second or so, 2 to 500."""
    return 2 if quick else max(2, min(500, round(100 / peer_works.gflop(problem))))


def _bare(
    problem: peer_works.Problem, optimizer: Any, state: Any, mesh: Mesh, num_steps: int
) -> Callable[[], Any]:
    _, tasks = peer_works.place(problem, mesh)
    options = {"chunk_size": problem.chunk_size}

    def meta_step(state, tasks):
        if mesh.size == 1:
            return outer.meta_step(problem.learner, optimizer, state, tasks, **options)
        return parallel.meta_step(problem.learner, optimizer, state, tasks, mesh=mesh, **options)

    program = jax.jit(meta_step).lower(state, tasks).compile()

    def run() -> Any:
        stepped = state
        for _ in range(num_steps):
            # One at a time, see `loop.compile_batches`: CPU devices that wait for each other hang.
            stepped, _ = jax.block_until_ready(program(stepped, tasks))
        return stepped

    return run


if __name__ == "__main__":
    main()
