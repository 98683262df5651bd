"""Where the time of an outer step goes: XLA's own operations, timed by its profiler, by kind.

    python benchmarks/breakdown.py --work conv-1q --out breakdown.jsonl

It uses one CPU device, so that operations run one at a time. The profiler itself costs about a
microsecond per operation: small operations look larger than they are. GFLOP/s are given for matrix
products only.
"""

import collections
import functools
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import peer_works

from jaxmaml import parallel

KINDS = {
    "matrix products": r" dot\(",  # the operation, not an operand that is named after it
    "patches (im2col)": r" concatenate\(|^pad_slice",
    "patches' derivative (col2im)": r"^(slice_select|slice_add|add_slice)",
    "reductions": r" reduce\(",
    "transposes and copies": r" (transpose|copy)\(",
    "random numbers": r" shift-right-logical\(",
}
"""An operation is of the first kind whose pattern its text matches; the rest is element-wise."""

COLUMNS = [
    *("work", "order", "kind", "ms", "share", "operations", "us_per_operation", "gflop_per_s"),
    "limit_gflop_per_s",
]


def main() -> None:
    """Profiles the chosen works."""
    parser = common.parser(__doc__)
    parser.add_argument("--work", nargs="+", choices=peer_works.PRESETS, default=["conv-1q"])
    parser.add_argument("--order", choices=["exact", "first"], default="exact")
    args = parser.parse_args()
    limit = common.matmul_rate(512 if args.quick else 2048) / 1e9
    rows = common.Rows(args)
    for work in args.work:
        profile = functools.partial(_profile, work, args.order, limit, quick=args.quick)
        common.print_table(rows.of({"work": work, "order": args.order}, profile), COLUMNS)


def _profile(work: str, order: str, limit: float, *, quick: bool) -> list[dict[str, Any]]:
    """Returns a row per kind of operation."""
    # Compile one outer step.
    preset = peer_works.PRESETS[work]
    problem = peer_works.build(peer_works.shrink(preset) if quick else preset, order)
    mesh = parallel.make_mesh(1)
    placed = peer_works.place(problem, mesh)
    gradient = peer_works.gradient(problem, mesh, problem.chunk_size)
    program = jax.jit(gradient).lower(*placed).compile()

    # Add up the time of each kind.
    kind_of = _kinds(program.as_text() or "")
    seconds: dict[str, float] = collections.defaultdict(float)
    counts = collections.Counter[str]()
    for name, took in _events(lambda: jax.block_until_ready(program(*placed))):
        if name in kind_of:
            seconds[kind_of[name]] += took
            counts[kind_of[name]] += 1

    # One row per kind, the longest first.
    total = sum(seconds.values())
    gflop = peer_works.gflop(problem)
    return [
        {
            "kind": kind, "ms": 1e3 * took, "share": took / total,
            "operations": counts[kind], "us_per_operation": 1e6 * took / counts[kind],
            "gflop_per_s": gflop / took if kind == "matrix products" else None,
            "limit_gflop_per_s": limit if kind == "matrix products" else None,
        }
        for kind, took in sorted(seconds.items(), key=lambda item: -item[1])
    ]  # fmt: skip


def _kinds(hlo: str) -> dict[str, str]:
    """Returns {name of an operation: its kind}; a fusion has the kind of what it calls."""
    bodies = dict(re.findall(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", hlo, re.M | re.S))
    kinds = {}
    for name, text in re.findall(r"^\s+(?:ROOT )?%([\w.\-]+) = ([^\n]*)", hlo, re.M):
        text = re.sub(r"metadata=\{[^}]*\}", "", text)
        called = re.search(r"calls=%([\w.\-]+)", text)
        inside = bodies.get(called.group(1), "") if called else ""
        body = re.sub(r"metadata=\{[^}]*\}|stack_frame_id=\d+", "", inside)
        # Control flow contains other operations, which are counted themselves.
        if not re.search(r"\b(while|call|conditional|tuple|get-tuple-element)\(", text):
            kinds[name] = _kind(f"{name} {text} {body}")
    return kinds


def _kind(text: str) -> str:
    return next((kind for kind, found in KINDS.items() if re.search(found, text)), "element-wise")


def _events(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Returns (name, seconds) of everything that XLA runs in a call, after two calls to warm up."""
    # Warm up.
    run()
    run()

    # Trace one call, and read the trace.
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 3, 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            run()
        (file,) = Path(directory).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
        return [
            (event.name, event.duration_ns / 1e9)
            for plane in profile.planes
            for line in plane.lines
            for event in line.events
            if math.isfinite(event.duration_ns)
        ]


if __name__ == "__main__":
    main()
