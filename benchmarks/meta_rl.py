"""Meta-reinforcement-learning in jaxmaml and in PyTorch: MAML on 2D navigation.

    python benchmarks/meta_rl.py --out rl.jsonl

A meta-iteration has the sizes of the MAML paper: 20 tasks, 20 trajectories of 100 steps before and after
adaptation, a policy with two hidden layers of 100 units, a linear baseline fitted to each task, and one
inner step. Adam or TRPO makes the outer step. "rollouts" are the trajectories before adaptation alone.
The last four works are parts of a meta-iteration: both rollouts with the inner step between them, the
meta-gradient on trajectories that were sampled before, and the products with the Hessian of
TRPO's divergence.

Our side is one compiled program per meta-iteration, in which nothing comes from the host or goes to it;
this is checked in its compiled form. The other side is written in PyTorch for this benchmark, in three
forms, see `torch_rl.py`. Both start from the same parameters. They are timed only if they agree: in
float64 from the same random numbers on, to 1e-8, and in float32 on the same trajectories, to 1e-4.

`ratio` is the time of PyTorch over ours, the median over rounds in which all sides take turns. Each side
uses one core or all of them, whichever is faster. Without PyTorch, only our side is timed.
"""

import argparse
import functools
import importlib
import importlib.util
import statistics
import sys
from collections.abc import Callable
from typing import Any

import common
import jax
import numpy as np
import rl_works
from rl_works import Program, Setup

from jaxmaml import diagnostics, parallel

WORKS: dict[str, str] = {
    "rollouts": "rollouts",
    "adam-exact": "gradient-exact",
    "adam-first": "gradient-first",
    "trpo-exact": "trpo-exact",
    "sampling": "rollouts",
    "gradient-exact": "gradient-exact",
    "gradient-first": "gradient-first",
    "kl-products": "kl-products",
}
"""The result that is compared before each work is timed."""
QUICK_WORKS = ("rollouts", "adam-exact")
TOLERANCE, FLOAT32_TOLERANCE = 1e-8, 1e-4
"""The largest relative errors."""
OURS = "jaxmaml"
SECONDS_PER_SIDE = 60
"""A slow work gets fewer rounds, to stay within this time, but at least three."""
SECONDS_BETWEEN_TURNS = 0.3
"""The threads of either side spin for a while after their work."""
COLUMNS = [
    *("work", "form", "ratio", "per_s", "our_per_s", "env_steps_per_s", "our_env_steps_per_s"),
    *("threads", "our_devices", "error", "float32_error", "gflop", "gflop_per_s", "limit"),
]


def main() -> None:
    """Times the chosen works, and prints the table."""
    options = _options()
    common.use_all_cores()
    setup = rl_works.make_setup(rl_works.QUICK if options.quick else rl_works.Sizes())
    rounds = options.rounds or (2 if options.quick else 9)
    table = common.Rows(options, benchmark="rl")
    has_torch = importlib.util.find_spec("torch") is not None
    checked = functools.cache(lambda: errors(setup) if has_torch else {})
    limit = functools.cache(lambda: None if options.quick else common.matmul_rate() / 1e9)
    rows: list[dict[str, Any]] = []
    for work in options.work:
        measure = functools.partial(_rows_of, work, setup, rounds, checked, limit)
        rows += table.of({"work": work}, measure)
    common.print_table(rows, COLUMNS)
    print("\nThe fastest form of each work:")
    timed = [row for row in rows if "ratio" in row]
    fastest = {row["work"]: row for row in sorted(timed, key=lambda row: -row["ratio"])}
    common.print_table(list(fastest.values()), COLUMNS)


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--work", nargs="+", choices=WORKS, help="defaults to all, or two if quick")
    parser.add_argument("--rounds", type=int, help="defaults to 9, or 2 if quick")
    options = parser.parse_args()
    options.work = options.work or (QUICK_WORKS if options.quick else list(WORKS))
    return options


def errors(setup: Setup) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the relative errors of PyTorch: form, what is compared, "error" or "float32_error".

    Raises:
        RuntimeError: an error is above its tolerance.
    """
    torch_works = importlib.import_module("torch_works")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dtype, name, tolerance, errors_of in (
        (np.float64, "error", TOLERANCE, torch_works.errors_from_noise),
        (np.float32, "float32_error", FLOAT32_TOLERANCE, torch_works.errors_on_batches),
    ):
        params, ours = rl_works.reference(setup, dtype)
        for form, by_result in errors_of(setup, params, ours).items():
            for result, error in by_result.items():
                found.setdefault(form, {}).setdefault(result, {})[name] = error
                if not error < tolerance:
                    raise RuntimeError(f"{form}: {result} differs from ours by {error:.1e}")
    return found


def _rows_of(
    work: str,
    setup: Setup,
    rounds: int,
    checked: Callable[[], dict[str, Any]],
    limit: Callable[[], float | None],
) -> list[dict[str, Any]]:
    """Returns a row per form, or that of our side if PyTorch is not installed.

    Args:
        work: a name of `WORKS`.
        setup: the work.
        rounds: turns of each side, fewer if they are slow.
        checked: returns the errors of PyTorch, or nothing if it is not installed.
        limit: returns the GFLOP/s of a large product; None if it is not wanted.
    """
    # Check and prepare both sides.
    found = checked()
    print(work, file=sys.stderr, flush=True)
    ours = _fastest_program(setup, work)
    sides: dict[str, Callable[[], Any]] = {OURS: ours.run}
    threads: dict[str, int] = {}
    if found:
        torch_works = importlib.import_module("torch_works")
        for form, (number, call) in torch_works.works(setup, work).items():
            threads[form], sides[form] = number, call

    # Time them in turn.
    slowest = max(common.seconds_of(run) for run in sides.values())
    rounds = min(rounds, max(3, int(SECONDS_PER_SIDE / slowest)))
    seconds = common.alternate(sides, rounds, pause=SECONDS_BETWEEN_TURNS)
    median = {side: statistics.median(times) for side, times in seconds.items()}
    num_env_steps = setup.num_env_steps(work)
    shared = _speed("our_", median[OURS], num_env_steps) | {
        "our_devices": ours.num_devices, "host_transfers": len(rl_works.host_transfers(ours.text)),
        "rounds": rounds, **_arithmetic(setup, work, median[OURS]), "limit": limit(),
    }  # fmt: skip
    if not found:
        return [{**shared, "reason": "PyTorch is not installed"}]
    return [
        {
            "form": form, "ratio": common.median_ratio(seconds, form, OURS),
            **_speed("", median[form], num_env_steps), "threads": threads[form],
            **found[form][WORKS[work]], **shared,
        }
        for form in threads
    ]  # fmt: skip


def _speed(prefix: str, seconds: float, num_env_steps: int | None) -> dict[str, float | None]:
    per_s = None if num_env_steps is None else num_env_steps / seconds
    values = {"seconds": seconds, "per_s": 1 / seconds, "env_steps_per_s": per_s}
    return {f"{prefix}{name}": value for name, value in values.items()}


def _arithmetic(setup: Setup, work: str, seconds: float) -> dict[str, float]:
    """The arithmetic of our side, where it is known: TRPO's depends on the length of its search."""

    def gflop(work: str) -> float:
        function, state = rl_works.function_of(setup, work, parallel.make_mesh(1))
        return diagnostics.count_flops(function, state) / 1e9

    if work in ("trpo-exact", "sampling"):
        return {}
    if work.startswith("adam"):
        # By its parts: XLA leaves out what the whole computes and nobody reads.
        total = 2 * gflop("rollouts") + gflop(work.replace("adam", "gradient"))
    else:
        total = gflop(work)
    return {"gflop": total, "gflop_per_s": total / seconds}


def _fastest_program(setup: Setup, work: str) -> Program:
    """The program on one device or on all of them, whichever is faster."""
    counts = {1, jax.device_count()} if work in rl_works.SPREAD else {1}
    counts = [n for n in sorted(counts) if setup.source.num_tasks % n == 0]
    programs = [rl_works.compile_work(setup, work, number) for number in counts]
    if len(programs) == 1:
        return programs[0]
    seconds = common.alternate({str(p.num_devices): p.run for p in programs}, 3)
    return min(programs, key=lambda program: min(seconds[str(program.num_devices)]))


if __name__ == "__main__":
    main()
