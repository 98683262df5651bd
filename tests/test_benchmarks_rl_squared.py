"""The benchmark of RL²: its rows, from a training of a moment."""

import importlib
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmaml import rl
from jaxmaml.sources import batches

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

rl_squared = importlib.import_module("rl_squared")


def test_a_training_gives_the_returns_of_the_episodes_and_the_optimum():
    setting = rl_squared.SETTINGS["bandits"]._replace(**rl_squared.QUICK)
    row = rl_squared.train(setting, seed=0)
    assert len(row["by_episode"]) == setting.num_episodes
    assert row["total"] == pytest.approx(sum(row["by_episode"]), rel=1e-6)
    assert (row["first"], row["last"]) == (row["by_episode"][0], row["by_episode"][-1])
    key = jax.random.key(rl_squared.TEST_KEY)
    sampler = rl.sampler(setting.environment, num_tasks=setting.num_test_tasks)
    tasks = next(batches(sampler, key))  # `evaluate` draws these, and not `sampler(key)`
    best = np.asarray(tasks.query.task).max(axis=1).mean() * setting.num_episodes
    assert row["optimum"] == pytest.approx(best, rel=1e-5)
    assert row["num_tasks"] == setting.num_tasks
