"""The benchmark of reinforcement learning: its programs, and that PyTorch computes what they do."""

import importlib
import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="PyTorch is not installed")
FORMS = {"environment by environment", "task by task", "all tasks at once"}


def _benchmark():
    """The module by its file: the tests have a package of the same name."""
    spec = importlib.util.spec_from_file_location("benchmarks_rl", BENCHMARKS / "meta_rl.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rl = _benchmark()
rl_works = importlib.import_module("rl_works")
SETUP = rl_works.make_setup(rl_works.QUICK)


def _torch_module(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@pytest.mark.slow
def test_the_command_appends_a_row_per_form(tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(BENCHMARKS / "meta_rl.py"), "--quick", "--work", "rollouts"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row.get("form") for row in rows} == (FORMS if HAS_TORCH else {None})
    for row in rows:
        assert row["work"] == "rollouts"
        assert row["our_env_steps_per_s"] == pytest.approx(4 * 3 * 10 / row["our_seconds"])
        assert row["our_per_s"] > 0
        if HAS_TORCH:
            assert row["error"] < rl.TOLERANCE
            assert row["ratio"] > 0
        else:
            assert row["reason"] == "PyTorch is not installed"


def test_our_meta_iteration_is_timed_without_torch():
    (row,) = rl._rows_of("adam-first", SETUP, 2, dict, lambda: 50.0)
    assert row["host_transfers"] == 0
    assert row["rounds"] == 2
    assert row["limit"] == 50.0
    assert row["gflop_per_s"] == pytest.approx(row["gflop"] / row["our_seconds"])
    assert row["our_env_steps_per_s"] == pytest.approx(2 * 4 * 3 * 10 * row["our_per_s"])


def test_a_program_that_calls_the_host_is_refused():
    """Its environment is a function of NumPy."""

    def step(key, position, action, goal):
        del key, goal
        shape = jax.ShapeDtypeStruct(position.shape, position.dtype)
        position = jax.pure_callback(np.add, shape, position, action, vmap_method="broadcast_all")
        return rl_works.rl.Step(position, position, jnp.zeros(()), jnp.array(False))

    problem = SETUP.problem
    hosted = problem._replace(environment=problem.environment._replace(step=step))
    with pytest.raises(RuntimeError, match=r"rollouts exchanges data with the host: .*callback"):
        rl_works.compile_work(SETUP._replace(problem=hosted), "rollouts", 1)


def test_environment_steps_are_those_of_the_rollouts():
    count = {work: SETUP.num_env_steps(work) for work in rl.WORKS}
    assert count["rollouts"] == 4 * 3 * 10
    assert {count[work] for work in ("adam-exact", "adam-first", "trpo-exact", "sampling")} == {240}
    assert {count[work] for work in count if work.startswith(("gradient", "kl"))} == {None}


@needs_torch
def test_every_form_of_torch_computes_what_we_do():
    found = rl.errors(SETUP)  # it raises if an error is too large
    assert set(found) == FORMS
    for by_result in found.values():
        assert {name for name, error in by_result.items() if error["error"] < 1e-8} == {
            *rl.WORKS.values()
        }
        float32 = {name: error.get("float32_error") for name, error in by_result.items()}
        assert {name for name, error in float32.items() if error is not None and error < 1e-4} == {
            *("gradient-exact", "gradient-first", "kl-products")
        }


@needs_torch
def test_another_gradient_is_noticed():
    params, ours = rl_works.reference(SETUP, np.float32)
    swapped = dict(zip(ours.grads, reversed(ours.grads.values()), strict=True))
    works = _torch_module("torch_works")
    for errors in works.errors_on_batches(SETUP, params, ours._replace(grads=swapped)).values():
        assert errors["gradient-exact"] > 100 * rl.FLOAT32_TOLERANCE
        assert errors["gradient-first"] > 100 * rl.FLOAT32_TOLERANCE


@needs_torch
@pytest.mark.parametrize("kind", ["Together", "Separate"])
def test_an_episode_ends_at_its_goal(kind):
    """The policy is all noise, so that the noise is the action."""
    torch, rollouts = (_torch_module(name) for name in ("torch", "torch_rollouts"))
    problem = SETUP.problem._replace(num_trajectories=2, horizon=3)
    params = {"log_std": torch.zeros(2), "kernel": torch.zeros(2, 2), "bias": torch.zeros(2)}
    noise = torch.tensor([[1.0, 0.0], [0.0, 5.0], [1.0, 1.0]])[:, None].repeat(1, 2, 1)
    noise[0, 1] = -2  # the second trajectory goes the other way, one unit per coordinate
    environment = getattr(rollouts, kind)
    found = rollouts.rollout(problem, environment, params, torch.tensor([0.1, 0.0]), noise)
    torch.testing.assert_close(found.mask, torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    away = [-((0.2**2 + 0.1**2) ** 0.5), -0.2, -((0.1**2 + 0.1**2) ** 0.5)]
    torch.testing.assert_close(found.rewards, torch.tensor([[0.0, 0.0, 0.0], away]))
    torch.testing.assert_close(found.observations[1, 1], torch.tensor([-0.1, -0.1]))


@needs_torch
def test_conjugate_gradients_solve():
    torch, torch_rl = (_torch_module(name) for name in ("torch", "torch_rl"))
    matrix = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)) + 0.1
    target = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    product = lambda vector: matrix @ vector
    found = torch_rl.conjugate_gradients(product, target, 3)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target))
    rough = torch_rl.conjugate_gradients(product, target, 1)
    assert (rough - found).norm() > 0.1
