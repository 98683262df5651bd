"""The table of compile time: what is counted, and that one size changes at a time."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

compile_time = importlib.import_module("compile_time")

TEXT = """HloModule jit_run, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %add.1 = f32[2]{0} add(%p, %p), metadata={op_name="x = y"}
}

ENTRY main.3 {
  Arg_0.1 = f32[2]{0} parameter(0)
  ROOT call.2 = f32[2]{0} fusion(Arg_0.1), kind=kLoop, calls=%fused
}
"""


def test_instructions_of_all_computations_are_counted():
    assert compile_time.num_instructions(TEXT) == 4


def test_one_size_changes_at_a_time():
    cases = compile_time.cases("mlp", compile_time.Sizes())
    assert len(set(cases)) == len(cases) == 14
    usual = compile_time.Case("mlp", "exact", 5, num_tasks=32, chunk_size=1)
    assert usual in cases
    changed = [case for case in cases if case.order == "exact" and case.chunk_size != 1]
    assert [case._replace(chunk_size=1) for case in changed] == [usual, usual]


def test_a_row_has_every_stage_and_the_size_of_the_program():
    case = compile_time.Case("mlp", "first", 2, num_tasks=2, chunk_size=1)
    row = compile_time.measure(case, quick=True)
    assert set(compile_time.COLUMNS) <= set(row) | set(case._fields)
    assert all(row[name] > 0 for name in ("trace_s", "lower_s", "compile_s"))
    assert row["lowered"] > 100
    assert row["optimized"] > 100


@pytest.mark.slow
def test_a_program_does_not_grow_with_the_inner_steps_and_nothing_is_measured_twice(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(BENCHMARKS / "compile_time.py"), "--quick", "--resume"]
    for _ in range(2):
        subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    sizes = {
        tuple(row[name] for name in ("order", "inner_steps", "chunk_size", "unroll")): (
            row["lowered"],
            row["optimized"],
        )
        for row in rows
    }
    assert len(rows) == len(sizes) == 8
    for order in ("exact", "first"):
        assert sizes[order, 2, 1, 1] == sizes[order, 20, 1, 1] < sizes[order, 20, 1, 4]
