"""Parts of the adapters, and what is said where the package of an adapter is missing."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmaml import rl
from jaxmaml.rl import adapters

CALLS = {
    "gymnax": lambda: rl.from_gymnax(None),
    "brax": lambda: rl.from_brax(None, lambda key: 0.0, lambda *_: jnp.zeros(())),
    "brax.envs": lambda: rl.half_cheetah(),
    "brax.math": lambda: rl.cheetah_segments(None),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("package", CALLS)
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, monkeypatch):
    """None in place of a module makes an import of it fail, as if it were not installed."""
    extra = package.partition(".")[0]
    for name in [extra, *(name for name in sys.modules if name.startswith(f"{extra}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"is not installed: pip install 'jaxmaml\[{extra}\]'"):
        CALLS[package]()


def test_another_error_of_an_import_is_not_hidden(tmp_path, monkeypatch):
    tmp_path.joinpath("a_broken_module.py").write_text("raise ImportError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"^broken$"):
        adapters.import_extra("a_broken_module", "brax")


def test_an_import_prints_nothing_to_standard_output(tmp_path, monkeypatch, capsys):
    tmp_path.joinpath("a_talking_module.py").write_text("print('hello')")
    monkeypatch.syspath_prepend(tmp_path)
    adapters.import_extra("a_talking_module", "brax")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "hello\n")


def _exploding():
    """An environment that ends with its third step, and is NaN afterwards."""
    zero = jnp.zeros(())

    def step(key, count, action, task):
        shown = jnp.where(count < 3, count + 1.0, jnp.nan)
        return rl.Step(count + 1, shown[None], shown, count == 2)

    start = lambda key, task: (0, zero[None])
    return rl.Environment(lambda key: zero, start, step, 1, 1)


def test_a_held_environment_stays_at_its_end():
    environment = adapters.held(_exploding())
    state, _ = environment.reset(jax.random.key(0), None)
    steps = []
    for _ in range(6):
        steps.append(environment.step(jax.random.key(0), state, jnp.zeros(1), None))
        state = steps[-1].state
    assert [float(step.reward) for step in steps] == [1, 2, 3, 0, 0, 0]
    assert [float(step.observation[0]) for step in steps] == [1, 2, 3, 3, 3, 3]
    assert [bool(step.done) for step in steps] == [False, False, True, True, True, True]
    assert int(state.state) == 3
    # A Python number in the first state does not become a weak type of the scan.
    kinds = lambda tree: jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), tree)
    assert kinds(state) == kinds(environment.reset(jax.random.key(0), None)[0])


def test_an_environment_that_explodes_after_its_end_has_the_losses_of_a_held_one():
    request = rl.Request(jax.random.key(0), jnp.zeros(()))
    found = []
    for environment in (_exploding(), adapters.held(_exploding())):
        policy_fn, params = rl.policy(environment, hidden_sizes=(), rngs=nnx.Rngs(0))
        problem = rl.Problem(environment, policy_fn, num_trajectories=2, horizon=6)
        batch = problem.experience(params, request)
        found.append(jax.grad(rl.losses(problem).loss_fn)(params, batch))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_flat_observations_keep_their_order_and_precision():
    found = adapters.flat((jnp.arange(4).reshape(2, 2), jnp.array([True])))
    assert (found.tolist(), found.dtype) == ([0, 1, 2, 3, 1], jnp.float32)
    with jax.enable_x64(True):
        assert adapters.flat(jnp.ones(2, jnp.float64)).dtype == jnp.float64
