"""RL², a policy that remembers, on the bandits and the tabular MDPs of its paper: return by episode.

    python benchmarks/rl_squared.py --out rl_squared.jsonl

A row per environment and seed, after a training with PPO: the return of each episode of a trial in 1,000
test tasks, of all episodes together, and the best return for who knows the task. README.md has the
table, beside that of `jaxmaml compare bandits` and `jaxmaml compare tabular-mdp`.
"""

import functools
import time
from typing import Any, NamedTuple

import common
import jax
import numpy as np
import optax
from flax import nnx

import jaxmaml
from jaxmaml import parallel, rl
from jaxmaml.metrics import mean_and_ci95
from jaxmaml.sources import batches


class Setting(NamedTuple):
    """A training.

    Attributes:
        environment: the tasks.
        num_episodes: the episodes of a trial.
        horizon: the steps of an episode.
        num_tasks: tasks per outer step, one trial in each.
        num_outer_steps: each makes `num_epochs` steps of Adam.
        learning_rate: of Adam; it falls to zero linearly.
        gae_lambda: of the advantages.
        hidden_size: of the GRU.
        num_test_tasks: those of the table.
    """

    environment: rl.Environment
    num_episodes: int
    horizon: int
    num_tasks: int
    num_outer_steps: int
    learning_rate: float
    gae_lambda: float
    hidden_size: int = 64
    num_epochs: int = 5
    num_test_tasks: int = 1000


SETTINGS: dict[str, Setting] = {
    # Ten pulls of five arms: an episode is one pull, as in the paper.
    "bandits": Setting(rl.bandit(5), 10, 1, 512, 600, 1e-2, 0.95),
    "tabular-mdp": Setting(rl.tabular_mdp(), 10, 10, 512, 600, 5e-3, 0.95),
}
QUICK = {"num_tasks": 4, "num_outer_steps": 2, "hidden_size": 4, "num_test_tasks": 8}
ENTROPY_WEIGHT, MAX_NORM = 0.01, 1.0
TEST_KEY = 2**31 - 1
"""The key of the test tasks, which no seed is."""


def main() -> None:
    """Trains on the chosen environments, and prints the table."""
    options = _options()
    common.use_all_cores()
    table = common.Rows(options, benchmark="rl_squared")
    rows = []
    for name in options.environment:
        setting = SETTINGS[name]._replace(**(QUICK if options.quick else {}))
        for seed in options.seeds:
            measure = functools.partial(train, setting, seed)
            rows += table.of({"environment": name, "seed": seed}, measure)
    common.print_table(rows, ["environment", "seed", "first", "last", "total", "ci95", "optimum"])


def _options() -> Any:
    parser = common.parser(__doc__)
    parser.add_argument("--environment", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    return parser.parse_args()


def train(setting: Setting, seed: int) -> dict[str, Any]:
    """Returns the row of one training."""
    environment = setting.environment
    policy, params = rl.recurrent_policy(
        environment, hidden_size=setting.hidden_size, rngs=nnx.Rngs(seed)
    )
    problem = rl.RecurrentProblem(
        environment, policy, num_episodes=setting.num_episodes, horizon=setting.horizon,
        gae_lambda=setting.gae_lambda,
    )  # fmt: skip
    learner = rl.rl_squared(problem, entropy_weight=ENTROPY_WEIGHT)
    num_updates = setting.num_epochs * setting.num_outer_steps
    rate = optax.linear_schedule(setting.learning_rate, 0.0, num_updates)
    adam = optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adam(rate))
    optimizer, mesh = rl.ppo(adam, num_epochs=setting.num_epochs), parallel.make_mesh()

    # The training; its time includes that of compiling.
    start = time.perf_counter()
    state = jaxmaml.init_state(learner, optimizer, params)
    source = rl.sampler(environment, num_tasks=setting.num_tasks)
    key, test_key = jax.random.key(seed), jax.random.key(TEST_KEY)
    steps = jaxmaml.fit(
        learner, optimizer, state, source, setting.num_outer_steps,
        key=key, num_steps_per_dispatch=10, chunk_size=None, mesh=mesh,
    )  # fmt: skip
    for state, metrics in steps:
        print(f"outer step {int(state.step)}: {metrics['trial_return'].mean():.4g}", flush=True)
    seconds = time.perf_counter() - start

    # The test.
    test_tasks = rl.sampler(environment, num_tasks=setting.num_test_tasks)
    returns = jaxmaml.evaluate(
        learner, problem.metric_fn, state, test_tasks,
        num_tasks=setting.num_test_tasks, key=test_key, chunk_size=None, mesh=mesh,
    )  # fmt: skip
    tasks = next(batches(test_tasks, test_key))  # as `evaluate` draws them
    return _summary(setting, returns, tasks) | {"seconds": seconds}


def _summary(setting: Setting, returns: np.ndarray, tasks: jaxmaml.Task) -> dict[str, Any]:
    by_episode, _, _ = mean_and_ci95(returns)
    total, ci95, _ = mean_and_ci95(returns.sum(axis=1))
    best = setting.environment.optimal_return
    assert best is not None
    optimum = jax.vmap(lambda task: best(task, setting.horizon))(tasks.query.task).mean()
    return {
        "num_outer_steps": setting.num_outer_steps, "num_tasks": setting.num_tasks,
        "by_episode": by_episode.tolist(), "first": float(by_episode[0]),
        "last": float(by_episode[-1]), "total": float(total), "ci95": float(ci95),
        "optimum": float(optimum) * setting.num_episodes,
    }  # fmt: skip


if __name__ == "__main__":
    main()
