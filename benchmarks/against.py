"""The same work timed with two checkouts of this repository, in turn.

Each checkout runs in a process of its own, `against_child.py`, which builds the work with the code of
that checkout. Both processes stay alive and make the same number of outer steps in turn: one of them
works while the other one waits, so a change of the machine's speed affects both.
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

CASES = [(order, call) for order in ("exact", "first") for call in ("meta_grad", "loop")]
"""What is timed: the jitted meta-gradient and the training loop, for both orders."""
SECONDS_PER_TURN = 0.5
"""A turn makes as many steps as take this time: shorter turns measure noise."""
NUM_PAIRS = 3
"""Pairs of processes: where a process finds its memory changes its speed for all its life."""
COLUMNS = [
    *("work", "order", "call", "devices", "other_ms", "this_ms", "ratio", "lower", "upper"),
    "reason",
]


class Child:
    """A process that makes outer steps of one work with the code of one checkout.

    Args:
        checkout: a checkout of this repository.
        work: a name of `peer_works.PRESETS`.
        quick: whether the work is shrunk.

    Raises:
        RuntimeError: the process ended early.
    """

    def __init__(self, checkout: Path, work: str, *, quick: bool):
        self.checkout = checkout.resolve()
        paths = [str(self.checkout), str(self.checkout / "benchmarks")]
        # Two processes share the memory of one accelerator.
        environ = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        # -P: the modules beside the child's file belong to another checkout.
        file = Path(__file__).with_name("against_child.py")
        command = [sys.executable, "-P", str(file), work, *(["--quick"] if quick else [])]
        self._process = subprocess.Popen(
            command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._answer()

    def run(self, order: str, call: str, num_steps: int) -> None:
        """Makes outer steps, and returns when they are done."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([order, call, num_steps]) + "\n")
        self._process.stdin.flush()
        self._answer()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.checkout} ended with {self._process.wait()}")
        return json.loads(line)


def compare(other: Path, work: str, rounds: int, *, quick: bool) -> list[dict[str, Any]]:
    """Returns one row per case: the time with this checkout over the time with another one.

    Args:
        other: another checkout of this repository.
        work: a name of `peer_works.PRESETS`.
        rounds: turns of each process.
        quick: whether the work is shrunk and one pair of processes is enough.

    Returns:
        Rows with the median times of an outer step ("other_ms", "this_ms"), and the median and the
        quartiles ("lower", "upper") of their ratio over all rounds of all pairs.

    Raises:
        RuntimeError: a process ended early.
        ValueError: the two checkouts do not build the same work, or one of them has none of that name.
    """
    # Time all cases in each pair of processes.
    found: dict[tuple[str, str], dict[str, list[float]]] = {
        case: {"other": [], "this": []} for case in CASES
    }
    about: dict[str, Any] = {}
    for _ in range(1 if quick else NUM_PAIRS):
        with _pair(other, work, quick) as children:
            about = children["this"].about
            for case in CASES:
                for name, seconds in _seconds_per_step(children, case, rounds, quick).items():
                    found[case][name] += seconds

    # One row per case.
    commits = {"other_commit": common.commit(other), "this_commit": common.commit(common.ROOT)}
    rows = []
    for (order, call), seconds in found.items():
        ratios = common.ratios(seconds, "this", "other")
        lower, median, upper = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
        rows.append({
            "work": work, "order": order, "call": call, **about, **commits,
            "other_ms": 1e3 * statistics.median(seconds["other"]),
            "this_ms": 1e3 * statistics.median(seconds["this"]),
            "ratio": median, "lower": lower, "upper": upper, "rounds": len(seconds["this"]),
        })  # fmt: skip
    return rows


@contextlib.contextmanager
def _pair(other: Path, work: str, quick: bool) -> Iterator[dict[str, Child]]:
    """Starts the processes of both checkouts, one after the other."""
    with contextlib.ExitStack() as stack:
        children = {}
        for name, checkout in (("other", other), ("this", common.ROOT)):
            children[name] = Child(checkout, work, quick=quick)
            stack.callback(children[name].close)
        if children["other"].about != children["this"].about:
            raise ValueError(
                f"the checkouts do not build the same {work}: {children['other'].about} there, "
                f"{children['this'].about} here"
            )
        yield children


def _seconds_per_step(
    children: dict[str, Child], case: tuple[str, str], rounds: int, quick: bool
) -> dict[str, list[float]]:
    """Returns the seconds of an outer step in each round. Both processes make the same steps."""
    num_steps = 2
    if not quick:
        step = lambda: children["other"].run(*case, 1)
        step()
        fastest = min(common.seconds_of(step) for _ in range(3))
        num_steps = math.ceil(SECONDS_PER_TURN / fastest)
    sides = {
        name: lambda child=child: child.run(*case, num_steps) for name, child in children.items()
    }
    turns = common.alternate(sides, rounds)
    return {name: [found / num_steps for found in seconds] for name, seconds in turns.items()}
