"""The same work in jaxmaml and in PyTorch, higher, torchopt, learn2learn and parallel-metalearn.

    python benchmarks/peers.py --out peers.jsonl

Both sides start from the same weights and tasks. They are timed only if they give the same
meta-gradient: it is checked in float64, where rounding hides nothing, and timed in float32. `ratio`
is the peer's time over ours, the median over rounds that alternate A B A B. jaxmaml spreads its tasks
over all cores; each peer runs with the better of one thread and all threads. For the sinusoid, our
side also samples its tasks and makes the outer step, hundreds of steps per dispatch; the peers compute
the meta-gradient and make the outer Adam step on fixed tasks. A peer that cannot run, or computes
something else, has a row with the reason.

Installation: first install the CPU build of PyTorch from the index that PyTorch's installation page
names (the default build on Linux includes CUDA), then run `pip install -e '.[peers]'`, which keeps it.
torch.compile needs a C++ compiler. learn2learn 0.2.0 is distributed as source only, with C files too
old for Python 3.11: unpack it, run `cython` (below 3) on `learn2learn/data/*.pyx`, install the result
(`pip install --no-build-isolation --no-deps .`), `gym`, `gsutil`, and `torchvision` of the same PyTorch
build. The peer uses nothing of torchvision: one that can only be imported will do.
"""

import contextlib
import functools
import math
import os
import signal
import statistics
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import peer_models
import peer_torch
import peer_works
import torch
from jax.sharding import Mesh

from jaxmaml import parallel
from jaxmaml.experiments.presets import Preset
from jaxmaml.types import MetaParams

WORKS = {
    "conv-15q-exact": ("conv-15q", "exact"),
    "conv-1q-exact": ("conv-1q", "exact"),
    "conv-1q-first": ("conv-1q", "first"),
    "conv-pooled-exact": ("conv-pooled", "exact"),
    "torchbench-exact": ("torchbench", "exact"),
    "mlp-exact": ("mlp", "exact"),
    "sinusoid-exact": ("sinusoid", "exact"),
}
"""(name in `peer_works.PRESETS`, order) of each work."""
QUICK_WORKS = ("sinusoid-exact",)

TOLERANCE = 1e-9
"""Largest relative error of a float64 meta-gradient that counts as rounding."""

SECONDS_PER_TURN = 0.1
"""A side repeats its step for at least this time per turn: shorter turns measure the clock."""

SECONDS_TO_BUILD = 120
"""A peer that is not ready after this time is not timed."""

SECONDS_PER_PEER = 40
"""A slow peer gets fewer rounds, to stay within this time, but at least three."""

SECONDS_BETWEEN_TURNS = 0.3
"""The threads of OpenMP, which PyTorch uses, spin for up to 0.2 s after their work."""

COLUMNS = [
    *("work", "peer", "ratio", "seconds", "our_seconds", "gflop", "gflop_per_s"),
    *("threads", "error", "reason"),
]
POOLED_BY_MAXIMUM = " (pool by torch.maximum)"


class Side(NamedTuple):
    """One side of a comparison.

    Attributes:
        run: makes `num_steps` outer steps and blocks until they are done.
        num_steps: the outer steps of one call.
    """

    run: Callable[[], Any]
    num_steps: int


def main() -> None:
    """Times the chosen works and peers."""
    parser = common.parser(__doc__)
    parser.add_argument(
        "--work", nargs="+", choices=WORKS, help="defaults to all, or one with --quick"
    )
    parser.add_argument(
        "--peer", nargs="+", choices=peer_torch.PEERS,
        help="defaults to all, or those that compile nothing with --quick",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help="defaults to 11, or 3 with --quick")
    parser.add_argument(
        "--seconds-to-compile", type=int, default=600,
        help=f"a peer of torch.compile has this time, others have {SECONDS_TO_BUILD} s",
    )  # fmt: skip
    args = parser.parse_args()
    common.use_all_cores()
    limit_memory()
    # float32, not TF32, on a GPU too; our side takes JAX_DEFAULT_MATMUL_PRECISION=highest.
    torch.backends.cudnn.allow_tf32 = False
    rounds = args.rounds or (3 if args.quick else 11)
    rows, table = [], common.Rows(args)
    works = args.work or (QUICK_WORKS if args.quick else WORKS)
    skipped = peer_torch.COMPILED if args.quick else ()
    limits = {
        peer: args.seconds_to_compile if peer in peer_torch.COMPILED else SECONDS_TO_BUILD
        for peer in args.peer or [name for name in peer_torch.PEERS if name not in skipped]
    }
    for work in works:
        found = rows_of(work, limits, rounds, table, quick=args.quick)
        common.print_table(found, COLUMNS)
        rows += [row for row in found if "ratio" in row]
    print("\nThe best peer of each work:")
    best = {row["work"]: row for row in sorted(rows, key=lambda row: -row["ratio"])}
    common.print_table(list(best.values()), COLUMNS)


def rows_of(
    work: str, limits: dict[str, int], rounds: int, table: common.Rows, *, quick: bool
) -> list[dict[str, Any]]:
    """Returns a row per peer, each appended as soon as it is measured.

    Args:
        work: a name of `WORKS`.
        limits: the seconds that each peer may take to be ready; names of `peer_torch.PEERS`.
        rounds: turns of each side.
        table: appends the rows.
        quick: whether the work is shrunk.
    """
    # Our side.
    name, order = WORKS[work]
    preset = peer_works.PRESETS[name]
    preset = peer_works.shrink(preset) if quick else preset
    problem = peer_works.build(preset, order)
    mesh = parallel.make_mesh()
    placed = peer_works.place(problem, mesh)
    gradient = peer_works.gradient(problem, mesh, problem.chunk_size)
    program = common.compiled(gradient, *placed)
    ours = _training(problem, mesh, quick) if preset.is_regression else repeated(program.run)
    shared = {
        "order": order, **peer_works.options(preset),
        "our_devices": mesh.size, "our_temp_bytes": program.temp_bytes,
        "gflop": peer_works.gflop(problem),
    }  # fmt: skip

    # Every peer.
    exact_inputs, reference = peer_works.in_float64(problem)
    rows, pools = (
        [],
        {"": "max_pool2d", **({POOLED_BY_MAXIMUM: "maximum"} if preset.pooled else {})},
    )
    for suffix, pool in pools.items():
        timed_model = peer_models.convert(preset, order, problem.params, problem.tasks, pool=pool)
        checked_model = peer_models.convert(preset, order, *exact_inputs, pool=pool)
        for peer, limit in limits.items():
            print(f"{work}: {peer}{suffix}", flush=True)
            models = checked_model, timed_model
            measure = functools.partial(
                _row, peer, models, limit, shared, preset, reference, ours, rounds
            )
            rows += table.of({"work": work, "peer": peer + suffix}, measure)
    return rows


def _row(
    peer: str,
    models: tuple[peer_models.Model, peer_models.Model],
    limit: int,
    shared: dict[str, Any],
    preset: Preset,
    reference: MetaParams,
    ours: Side,
    rounds: int,
) -> dict[str, Any]:
    """Returns `shared` and the measurements of a peer, or the reason for having none.

    Args:
        peer: a name of `peer_torch.PEERS`.
        models: the model in float64, whose gradient is checked, and the one in float32 that is timed.
        limit: the seconds that it may take to be ready.
        shared: what the rows of a work share.
        preset: the settings of the work.
        reference: our meta-gradient in float64.
        ours: our side.
        rounds: turns of each side.
    """
    checked_model, timed_model = models
    try:
        # Check its meta-gradient.
        with _time_limit(limit):
            error = _error(peer_torch.PEERS[peer](checked_model), reference, preset)
        if not error < TOLERANCE:
            reason = f"not timed: its meta-gradient differs by {error:.1e}"
            return {**shared, "error": error, "reason": reason}

        # Time it.
        made = peer_torch.PEERS[peer](timed_model)
        with _time_limit(limit):
            made.run()
        step = _blocking(_with_outer_step(made, preset) if preset.is_regression else made.run)
        threads, theirs = _best_threads(step)
        times = _times(ours, theirs, rounds)
        rate = shared["gflop"] / times["our_seconds"]
        return {**shared, "error": error, "threads": threads, **times, "gflop_per_s": rate}
    # A failed import or a compiler's crash is a result too.
    except Exception as failure:
        lines = str(failure).strip().splitlines() or [""]
        return {**shared, "reason": f"{type(failure).__name__}: {lines[0][:120]}"}


def limit_memory() -> None:
    """Makes an allocation fail where the kernel would end the process: it becomes a row, too.

    The limit is the memory that is available now; Linux only.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        import resource
    except (OSError, ImportError):
        return
    sizes = dict(line.split(":") for line in lines)
    num_bytes = int(sizes["MemAvailable"].split()[0]) * 1024
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, most))


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raises TimeoutError if the block takes longer: a compiler may take many minutes."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"its first run, compilation included, took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _error(peer: peer_torch.Peer, reference: MetaParams, preset: Preset) -> float:
    peer.run()
    gradient = {name: _gradient_of(leaf) for name, leaf in peer.params.items()}
    return peer_models.relative_error(gradient, reference, preset)


def _gradient_of(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach().clone()


def _times(ours: Side, theirs: Side, rounds: int) -> dict[str, Any]:
    """Returns the median seconds of a step on both sides, and the median of their ratio."""
    rounds = min(rounds, max(3, int(SECONDS_PER_PEER / common.seconds_of(theirs.run))))
    sides = {"peer": theirs.run, "ours": ours.run}
    seconds = common.alternate(sides, rounds, pause=SECONDS_BETWEEN_TURNS)
    ratio = common.median_ratio(seconds, "peer", "ours")
    return {
        "ratio": ratio * ours.num_steps / theirs.num_steps,
        "seconds": statistics.median(seconds["peer"]) / theirs.num_steps,
        "our_seconds": statistics.median(seconds["ours"]) / ours.num_steps,
        "rounds": rounds,
    }


def repeated(step: Callable[[], Any]) -> Side:
    """Returns a side that makes a step several times per turn."""
    step()
    num_steps = min(1000, math.ceil(SECONDS_PER_TURN / _fastest(step)))

    def run() -> None:
        for _ in range(num_steps):
            step()

    return Side(run, num_steps)


def _fastest(step: Callable[[], Any]) -> float:
    """Returns the seconds of the fastest of three calls, or of fewer if they take two seconds."""
    step()  # the first call may compile or allocate
    found: list[float] = []
    while len(found) < 3 and sum(found) < 2:
        found.append(common.seconds_of(step))
    return min(found)


def _best_threads(step: Callable[[], None]) -> tuple[int, Side]:
    """Returns (number of threads, side) of the faster of one thread and one per core."""
    seconds = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        seconds[threads] = _fastest(step)
    best = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(best)
    return best, repeated(step)


def _blocking(step: Callable[[], None]) -> Callable[[], None]:
    """Returns a step that waits for the device."""

    def blocking() -> None:
        step()
        peer_models.synchronize()

    return blocking


def _with_outer_step(peer: peer_torch.Peer, preset: Preset) -> Callable[[], None]:
    # The fused Adam is PyTorch's fastest.
    optimizer = torch.optim.Adam(list(peer.params.values()), lr=preset.outer_lr, fused=True)

    def step() -> None:
        peer.run()
        optimizer.step()

    return step


def _training(problem: peer_works.Problem, mesh: Mesh, quick: bool) -> Side:
    """Returns our side with sampling, meta-gradient and outer step."""
    num_steps = 10 if quick else 500
    return Side(peer_works.training_loop(problem, mesh, num_steps), num_steps)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    main()
