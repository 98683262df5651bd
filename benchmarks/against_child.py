"""The process that `speed.py --against` starts for a checkout: it makes outer steps on demand.

PYTHONPATH names the checkout and its benchmarks: jaxmaml, `common` and `peer_works` are those of that
commit, which may be an older one. The process prints what it has built, then reads one JSON list
[order, call, number of steps] per line, makes these steps and prints a line.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import common
import jax
import peer_works

import jaxmaml
from jaxmaml import parallel

Call = Callable[[int], Any]
"""Makes a number of outer steps, and blocks until they are done."""

MAX_STEPS = 500
"""The training loop is compiled for this number of steps per dispatch; fewer may be made."""


def main() -> None:
    """Builds the work of the command line and serves requests until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()

    # Build and compile.
    jax.config.update("jax_disable_most_optimizations", args.quick)  # an older common has no Quick
    common.use_all_cores()
    if args.work not in peer_works.PRESETS:  # an older commit
        print("null", flush=True)
        return
    preset = peer_works.PRESETS[args.work]
    preset = peer_works.shrink(preset) if args.quick else preset
    mesh = _mesh(preset.num_tasks)
    calls: dict[tuple[str, str], Call] = {}
    for order in ("exact", "first"):
        problem = peer_works.build(preset, order)
        calls[order, "meta_grad"] = _meta_grad(problem, mesh)
        calls[order, "loop"] = _loop(problem, mesh)
    print(json.dumps({"devices": mesh.size, **peer_works.options(preset)}), flush=True)

    # Serve.
    for line in sys.stdin:
        order, call, num_steps = json.loads(line)
        calls[order, call](num_steps)
        print("null", flush=True)


def _mesh(num_tasks: int) -> Any:
    # An older commit has the same function under another name.
    make: Any = getattr(parallel, "task_mesh", lambda _: parallel.make_mesh())
    return make(num_tasks)


def _meta_grad(problem: peer_works.Problem, mesh: Any) -> Call:
    gradient = peer_works.gradient(problem, mesh, problem.chunk_size)
    run, _ = common.compiled(gradient, *peer_works.place(problem, mesh))

    def call(num_steps: int) -> None:
        for _ in range(num_steps):
            run()

    return call


def _loop(problem: peer_works.Problem, mesh: Any) -> Call:
    # Version 0.1 has the same function in another module, under another name.
    if hasattr(jaxmaml, "Exact"):
        module = importlib.import_module("jaxmaml.fitting")
        compile_program = module.compile_program
    else:
        module = importlib.import_module("jaxmaml.train.loop")
        compile_program = module.compile_steps
    optimizer = peer_works.optimizer(problem.preset)
    meta_state = peer_works.init_state(problem, mesh)
    program = compile_program(
        problem.learner, optimizer, meta_state, peer_works.source(problem.preset),
        key=jax.random.key(0), chunk_size=problem.chunk_size, num_steps_per_dispatch=MAX_STEPS,
        mesh=mesh,
    )  # fmt: skip
    # Earlier programs carry one state, not two.
    start = module.States(meta_state, meta_state) if hasattr(module, "States") else meta_state

    def call(num_steps: int) -> None:
        # A dispatch makes at most MAX_STEPS.
        for first in range(0, num_steps, MAX_STEPS):
            jax.block_until_ready(program.run(start, min(MAX_STEPS, num_steps - first)))

    return call


if __name__ == "__main__":
    main()
