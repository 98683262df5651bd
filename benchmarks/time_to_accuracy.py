"""Seconds until a validation accuracy is reached, compilation included: jaxmaml and its peers.

    python benchmarks/time_to_accuracy.py --out time_to_accuracy.jsonl

Every side trains exact MAML on glyphs-5w1s with the same network, initial parameters, tasks, inner rate
and outer Adam until it reaches the target on the same validation tasks. The sides take turns, each in a
fresh process with an empty compilation cache. The clock runs while a side compiles and trains. It stands
still while a side is scored and while a peer's tasks are drawn, see `accuracy_child.py`. `ratio` is the
median over rounds of a peer's seconds over ours. A side that does not get there has a row that says so.

The default peers are those that were fastest on conv-1q-exact in `peers.py`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import accuracy_child
import common
import peer_torch
from accuracy_child import OURS

CACHES = ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
DEFAULT_PEERS = ("torch.func vmap", "learn2learn")
COLUMNS = [
    *("side", "target", "seconds", "ratio", "steps", "first_seconds", "ms_per_step", "reason"),
]


def main() -> None:
    """Trains all sides in turn, and prints the table."""
    options = _options()
    # The parent asks JAX for the device only.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    common.use_all_cores()
    table, rows = common.Rows(options), []
    for number in range(options.rounds):
        for side in (OURS, *options.peer):
            print(f"round {number}: {side}", flush=True)
            case = {
                "side": side, "round": number, "target": options.target, "every": options.every,
                "max_steps": options.max_steps,
            }  # fmt: skip
            rows += table.of(case, lambda side=side: _row_of(side, options))
    common.print_table([_summary(side, rows) for side in (OURS, *options.peer)], COLUMNS)


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    accuracy_child.add_options(parser)
    parser.add_argument(
        "--peer", nargs="+", choices=peer_torch.PEERS,
        help=f"defaults to {' and '.join(DEFAULT_PEERS)}, or the first of them with --quick",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="defaults to 3, or 1 with --quick")
    options = parser.parse_args()
    options.peer = options.peer or list(DEFAULT_PEERS[:1] if options.quick else DEFAULT_PEERS)
    defaults = {"target": (0.9, 0.25), "max_steps": (6000, 10), "every": (50, 5), "rounds": (3, 1)}
    for name, (full, quick) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def _row_of(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of a side, trained in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("accuracy_child.py")), side]
    for name in ("target", "max_steps", "every", "data_dir", "data"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--quick"] if options.quick else []
    with tempfile.TemporaryDirectory() as empty:
        environ = os.environ | {name: str(Path(empty, name)) for name in CACHES}
        ran = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    lines = (ran.stdout if ran.returncode == 0 else ran.stderr).strip().splitlines() or [""]
    return json.loads(lines[-1]) if ran.returncode == 0 else {"reason": lines[-1][:160]}


def _summary(side: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the medians over rounds of a side."""
    own, ours = (
        {row["round"]: row for row in rows if row["side"] == name and row.get("seconds")}
        for name in (side, OURS)
    )
    if not own:
        reasons = [row["reason"] for row in rows if row["side"] == side]
        return {"side": side, "reason": reasons[0]}
    middle = lambda name: statistics.median(row[name] for row in own.values())
    both = [own[number]["seconds"] / ours[number]["seconds"] for number in own if number in ours]
    return {
        "side": side, "target": middle("target"), "seconds": middle("seconds"),
        "ratio": statistics.median(both) if both else None, "steps": middle("steps"),
        "first_seconds": middle("first_seconds"),
        "ms_per_step": 1e3 * statistics.median(_seconds_per_step(row) for row in own.values()),
    }  # fmt: skip


def _seconds_per_step(row: dict[str, Any]) -> float:
    """Returns the seconds of a step after the first validation, which compilation precedes."""
    (first, start, _), (last, end, _) = row["curve"][0], row["curve"][-1]
    return (end - start) / (last - first) if last > first else float("nan")


if __name__ == "__main__":
    main()
