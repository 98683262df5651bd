"""Counts what the devices of a large machine would exchange, compute and hold in an outer step.

    python benchmarks/scaling.py --out scaling.jsonl
    python benchmarks/scaling.py --work conv4 --num-devices 8 256
    python benchmarks/scaling.py --times --out scaling.jsonl
    python benchmarks/scaling.py --expect scaling.jsonl

The first two compile the outer step for simulated CPU devices, and run nothing: the number, kind and
bytes of its collective operations, and per device its FLOPs, its share of parameters and optimizer
state, and its temporary memory. Each device has the same number of tasks, however many devices there
are. "replicated" keeps parameters and Adam's moments on every device, "sharded" splits them over all.

`--times` runs it: over the devices of this process, and on a CPU over one and two processes of one
device each. Simulated devices share the cores, so their times would say nothing.

`--expect` derives the efficiency on nodes of eight H100 from rows of the first kind, see `expected_row`.
"""

import argparse
import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import common
import compile_time
import jax
import jax.numpy as jnp
import language_model
import large_models
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import jaxmaml
from jaxmaml import diagnostics, parallel, processes
from jaxmaml.types import MetaLearner, MetaState, Params, Task

LAYOUTS = {"replicated": (), "sharded": ("tasks",)}
"""The axes over which parameters and optimizer state are split."""
NUM_DEVICES = (1, 2, 4, 8, 256)
HOST_TRANSFER = re.compile(r" (infeed|outfeed|send|recv|custom-call.*callback.*)\(")
EXPECTED_DEVICES = (8, 256, 4096)
NUM_TIMED = 20
"""Outer steps whose time is measured."""
COLUMNS = [
    *("work", "layout", "num_devices", "collectives", "sent_mib", "gflop", "state_mib", "temp_mib"),
    *("num_processes", "ms"),
]


class Work(NamedTuple):
    """A learner, the shapes of its parameters, and those of one task.

    Attributes:
        learner: exact MAML.
        params: the shapes of its parameters.
        task: the shapes of a task.
        per_device: the tasks of each device.
    """

    learner: MetaLearner
    params: Params
    task: Task
    per_device: int


def _classifier(model: str, num_inner_steps: int, per_device: int, quick: bool) -> Work:
    (loss_fn, params), image_shape = compile_time.MODELS[model](quick)
    if quick:  # eight devices can split it
        image_shape = (16, 16, 1)
        loss_fn, params = common.conv4(image_shape=image_shape, num_filters=8)
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), num_inner_steps)
    batch = lambda number: {
        "inputs": jax.ShapeDtypeStruct((5 * number, *image_shape), jnp.float32),
        "targets": jax.ShapeDtypeStruct((5 * number,), jnp.int32),
    }
    return Work(learner, params, Task(batch(1), batch(15)), per_device)


def _transformer(quick: bool) -> Work:
    model = language_model.QUICK if quick else language_model.MODELS["1.3B"]

    def loss_fn(params: Params, tokens: Any) -> Any:
        return language_model.loss_fn(params, {}, tokens, jnp.bfloat16)

    optimizer = optax.adam(1e-4, eps_root=1e-16)
    learner = jaxmaml.maml(loss_fn, optimizer, 1, adjoint=large_models.EVERY)
    tokens = jax.ShapeDtypeStruct((1, model.sequence + 1), jnp.int32)
    return Work(learner, language_model.base_shapes(model), Task(tokens, tokens), 1)


WORKS: dict[str, Callable[[bool], Work]] = {
    "conv4": functools.partial(_classifier, "conv4", 1, 4),
    "resnet12": functools.partial(_classifier, "resnet12", 5, 1),
    "transformer": _transformer,
}
"""Given whether it is small: the work."""


def main() -> None:
    """Compiles or times the works, and prints the table."""
    options = _options()
    if options.child is not None:
        print(json.dumps(_child(options)), flush=True)
        return
    if options.expect is not None:
        found = [json.loads(line) for line in options.expect.read_text().splitlines()]
        replicated = [r for r in found if (r.get("layout"), r["num_devices"]) == ("replicated", 8)]
        rows = [expected_row(row, n) for row in replicated for n in EXPECTED_DEVICES]
        common.print_table(
            rows, ["work", "num_devices", "compute_ms", "all_reduce_ms", "efficiency"]
        )
        return
    table, rows = common.Rows(options, benchmark="scaling"), []
    for work in options.work:
        for case in _cases(work, options):
            rows += table.of(case, functools.partial(_row_of, case, options))
    common.print_table(rows, COLUMNS)


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--work", nargs="+", choices=WORKS, help="defaults to all, or conv4 if quick"
    )
    parser.add_argument("--num-devices", nargs="+", type=int, help="simulated devices")
    parser.add_argument(
        "--times", action="store_true", help="measure times, on the devices there are"
    )
    parser.add_argument("--expect", type=Path, metavar="FILE", help="rows of an earlier call")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quick = options.quick or options.times
    options.work = options.work or (["conv4"] if quick else list(WORKS))
    options.num_devices = options.num_devices or ([2] if options.quick else list(NUM_DEVICES))
    return options


def _cases(work: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    if not options.times:
        sizes = [(layout, number) for layout in LAYOUTS for number in options.num_devices]
        return [{"work": work, "layout": layout, "num_devices": n} for layout, n in sizes]
    if jax.default_backend() != "cpu":
        numbers = sorted({1, jax.device_count()})
        return [{"work": work, "num_devices": n, "num_processes": 1} for n in numbers]
    return [{"work": work, "num_devices": n, "num_processes": n} for n in (1, 2)]


def _row_of(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of a case. Each number of devices or processes needs processes of its own."""
    if options.times and jax.default_backend() != "cpu":
        return _times(case, options.quick)
    number = case.get("num_processes", 1)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    quick = ["--quick"] if options.quick else []
    children = [
        subprocess.Popen(
            [
                sys.executable, __file__, *quick, "--child",
                json.dumps(case | {"process": process, "coordinator": coordinator}),
            ],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for process in range(number)
    ]  # fmt: skip
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        sys.exit(f"error: a process of {case} ended with {[c.returncode for c in children]}")
    return json.loads(outputs[0].splitlines()[-1])


def _child(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the row of a case, in a process with as many simulated devices as it needs."""
    case = json.loads(options.child)
    if "num_processes" not in case:
        jax.config.update("jax_num_cpu_devices", case["num_devices"])
        return compiled_row(WORKS[case["work"]](options.quick), case["num_devices"], case["layout"])
    jax.config.update("jax_num_cpu_devices", 1)
    if case["num_processes"] > 1:
        processes.initialize(case["coordinator"], case["num_processes"], case["process"])
    return _times(case, options.quick)


def compiled_row(work: Work, num_devices: int, layout: str) -> dict[str, Any]:
    """Returns what a compiled outer step exchanges, computes and holds.

    Args:
        work: what is trained.
        num_devices: the devices of the mesh.
        layout: a name of `LAYOUTS`.
    """
    # Shapes, placed on the mesh.
    mesh = parallel.make_mesh(num_devices)
    optimizer = optax.adam(1e-3)
    make = lambda params: jaxmaml.init_state(work.learner, optimizer, params)
    state = jax.eval_shape(make, work.params)
    specs = parallel.split_specs(state, mesh, LAYOUTS[layout])
    state = _placed(state, specs, mesh)
    num_tasks = work.per_device * num_devices
    stacked = lambda leaf: jax.ShapeDtypeStruct((num_tasks, *leaf.shape), leaf.dtype)
    tasks = jax.tree.map(stacked, work.task)
    tasks = _placed(tasks, jax.tree.map(lambda _: PartitionSpec("tasks"), tasks), mesh)

    # Compile. XLA has decided what is sent and held before it makes machine code.
    step = functools.partial(
        jaxmaml.meta_step, work.learner, optimizer, mesh=mesh, chunk_size=1,
        specs=specs.params if LAYOUTS[layout] else None,
    )  # fmt: skip
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    kept = jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)
    compiled = kept.lower(state, tasks).compile(
        compiler_options=large_models.find_target("cpu").options
    )
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    found = diagnostics.collectives(text)
    kinds = sorted({collective.kind for collective in found})
    counts = {kind: sum(c.kind == kind for c in found) for kind in kinds}
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), work.task)
    alone = functools.partial(jaxmaml.meta_step, work.learner, optimizer, chunk_size=1)
    flops = work.per_device * diagnostics.count_flops(alone, jax.eval_shape(make, work.params), one)
    return {
        "collectives": counts,
        "sent_mib": sum(c.num_bytes for c in found) / common.MIB,
        "params_mib": common.num_bytes(work.params) / common.MIB,
        "gflop": flops / 1e9,
        "state_bytes": _bytes_per_device(state, mesh),
        "state_mib": _bytes_per_device(state, mesh) / common.MIB,
        "temp_mib": memory.temp_size_in_bytes / common.MIB,
        "argument_bytes": memory.argument_size_in_bytes,
        "num_host_transfers": len(HOST_TRANSFER.findall(text)),
    }


def expected_row(row: dict[str, Any], num_devices: int) -> dict[str, Any]:
    """Returns the expected efficiency on nodes of eight H100 GPUs: an estimate, not a measurement.

    The gradient is summed within a node (NVLink 4, 450 GB/s per GPU and direction), and between nodes
    each GPU sums its eighth of it (one port of 400 Gb/s per GPU). The latency is 3 us per step of the
    ring in a node, and 10 us per level of a tree between nodes. Computing runs at 40 % of 989 TFLOP/s
    (bfloat16) in the Transformer, and at 10 % of 67 TFLOP/s (float32) in networks whose products are
    small.

    Args:
        row: what `compiled_row` counted, with parameters on every device.
        num_devices: 8, or a multiple of it.
    """
    flops_per_second = 0.4 * 989e12 if row["work"] == "transformer" else 0.1 * 67e12
    compute = row["gflop"] * 1e9 / flops_per_second
    num_bytes, num_nodes = row["sent_mib"] * common.MIB, num_devices / 8
    within = 2 * 7 / 8 * num_bytes / 450e9 + 14 * 3e-6
    between = 2 * (1 - 1 / num_nodes) * num_bytes / 8 / 50e9 + 2 * math.log2(num_nodes) * 10e-6
    return {
        "work": row["work"], "num_devices": num_devices, "compute_ms": 1e3 * compute,
        "all_reduce_ms": 1e3 * (within + between),
        "efficiency": compute / (compute + within + between),
    }  # fmt: skip


def _placed(tree: Any, specs: Any, mesh: Any) -> Any:
    place = lambda leaf, spec: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
    )
    return jax.tree.map(place, tree, specs)


def _bytes_per_device(tree: Any, mesh: Any) -> int:
    part = lambda leaf: int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
    return sum(part(leaf) for leaf in jax.tree.leaves(tree))


def _times(case: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Returns the time of an outer step over all devices of all processes."""
    work, mesh = WORKS[case["work"]](quick), parallel.make_mesh(case["num_devices"])
    optimizer, rng = optax.adam(1e-3), np.random.default_rng(0)
    num_tasks = work.per_device * len(parallel.local_places(mesh))

    def draw(leaf: Any) -> Any:
        shape = (num_tasks, *leaf.shape)
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        drawn = rng.normal(size=shape) if is_float else rng.integers(0, 5, shape)
        return drawn.astype(leaf.dtype)

    tasks, _ = parallel.spread(jax.tree.map(draw, work.task), mesh)
    state = parallel.place(jaxmaml.init_state(work.learner, optimizer, work.params), mesh)
    step = jax.jit(functools.partial(jaxmaml.meta_step, work.learner, optimizer, mesh=mesh))

    def run() -> MetaState:
        stepped = state
        for _ in range(2 if quick else NUM_TIMED):
            stepped = jax.block_until_ready(step(stepped, tasks)[0])
        return stepped

    run()
    seconds = min(common.seconds_of(run) for _ in range(1 if quick else 3))
    return {
        "num_tasks": work.per_device * mesh.shape["tasks"],
        "ms": 1e3 * seconds / (2 if quick else NUM_TIMED),
    }


if __name__ == "__main__":
    main()
