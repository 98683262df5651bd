"""Measures what checkpoints cost a training: the time that they hold it up, their writing, their size.

    python benchmarks/checkpoints.py omniglot-5w1s --data-dir DIR --out checkpoints.jsonl

A checkpoint is saved every `--every` outer steps. "hold_ms" is how long the training waits for one,
"write_ms" how long a thread then writes it. "share" is their sum over the time of the steps between two
checkpoints, in %: a bound, since the thread leaves most of a core to the training.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import jax
import runs

from jaxmaml import fitting
from jaxmaml.checkpoint import Manager
from jaxmaml.experiments import presets
from jaxmaml.experiments.candidates import single
from jaxmaml.experiments.experiment import build_candidate, init_state
from jaxmaml.types import MetaState

NUM_STEPS = 20
"""Outer steps between two checkpoints here, over which the time of a step is measured."""
COLUMNS = ["preset", "learner", "every", "step_ms", "hold_ms", "write_ms", "share", "mb"]


def main() -> None:
    """Measures, prints and appends a row."""
    parser = common.parser(__doc__)
    parser.add_argument("preset", choices=list(presets.PRESETS))
    parser.add_argument("--learner", default="maml")
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=10)
    runs.add_options(parser)
    options = parser.parse_args()
    case = {"preset": options.preset, "learner": options.learner, "every": options.every}
    rows = common.Rows(options).of(case, lambda: measure(options))
    common.print_table(rows, COLUMNS)


def measure(options: Any) -> dict[str, Any]:
    """Returns the row of a preset."""
    # Build and compile.
    preset = presets.get(options.preset)
    experiment = runs.build(preset, 0, options)
    candidate = build_candidate(experiment, single(preset, options.learner, None))
    start = init_state(experiment, candidate)
    program = fitting.compile_program(
        candidate.learner, experiment.optimizer, start, experiment.sources["train"],
        key=experiment.train_key, chunk_size=candidate.chunk_size, mesh=experiment.mesh,
        num_steps_per_dispatch=NUM_STEPS,
    )  # fmt: skip

    # Train, and save after each dispatch what a command saves: two states and a record.
    rounds = 2 if options.quick else options.rounds
    steps, holds, writes, size = [], [], [], 0
    with tempfile.TemporaryDirectory() as directory:
        manager, before = Manager(directory), time.perf_counter()
        for state, _ in fitting.run_program(program, start, rounds * NUM_STEPS):
            steps.append((time.perf_counter() - before) / NUM_STEPS)
            holds.append(common.seconds_of(lambda state=state: _save(manager, state)))
            writes.append(common.seconds_of(manager.wait))
            before = time.perf_counter()
        newest = Path(directory, f"{manager.steps[-1]:09d}")
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())

    # The first round warms up.
    step, hold, write = (statistics.median(found[1:]) for found in (steps, holds, writes))
    return {
        "step_ms": 1e3 * step, "hold_ms": 1e3 * hold, "write_ms": 1e3 * write,
        "share": 100 * (hold + write) / (options.every * step), "mb": size / 1e6,
    }  # fmt: skip


def _save(manager: Manager, state: MetaState) -> None:
    pair = jax.block_until_ready({"state": state, "selected": state})
    manager.save(pair, step=int(state.step), record={"curve": []})


if __name__ == "__main__":
    common.use_all_cores()
    main()
