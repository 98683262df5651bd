"""The sinusoid tasks are those of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmaml.data import sinusoid


def test_curve_is_a_shifted_sine():
    values = sinusoid.curve(jnp.array(2.0), jnp.array(np.pi / 2), jnp.array([0.0, np.pi]))
    np.testing.assert_allclose(values, [-2, 2], rtol=1e-6)


def test_shapes_ranges_and_distributions():
    sample = jax.jit(sinusoid.sampler(num_tasks=4000, shot=5, query=3))
    task = sample(jax.random.key(0))
    assert task.support["inputs"].shape == task.support["targets"].shape == (4000, 5, 1)
    assert task.query["inputs"].shape == task.query["targets"].shape == (4000, 3, 1)
    x = np.concatenate([task.support["inputs"], task.query["inputs"]], axis=1).ravel()
    assert x.min() >= -5
    assert x.max() <= 5
    # Means of U[-5, 5] and its square, within five standard errors.
    assert abs(x.mean()) < 5 * 2.887 / np.sqrt(x.size)
    assert abs((x**2).mean() - 25 / 3) < 5 * 7.454 / np.sqrt(x.size)


def test_support_and_query_lie_on_one_curve_of_the_right_family():
    task = sinusoid.sampler(num_tasks=2000, shot=10, query=6)(jax.random.key(1))
    task = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64)[..., 0], task)
    amplitudes, phases = [], []
    for x, y, new_x, new_y in zip(*task.support.values(), *task.query.values(), strict=True):
        # A sin(x - p) = a sin x - b cos x with a = A cos p and b = A sin p, fitted on the support.
        (a, b), *_ = np.linalg.lstsq(np.stack([np.sin(x), -np.cos(x)], 1), y, rcond=None)
        np.testing.assert_allclose(a * np.sin(new_x) - b * np.cos(new_x), new_y, atol=1e-4)
        amplitudes.append(np.hypot(a, b))
        phases.append(np.arctan2(b, a))
    for values, low, high in ((amplitudes, 0.1, 5.0), (phases, 0.0, np.pi)):
        scaled = (np.array(values) - low) / (high - low)
        assert scaled.min() > -1e-4
        assert scaled.max() < 1 + 1e-4
        histogram = np.histogram(scaled, bins=10, range=(-1e-3, 1 + 1e-3))[0]
        assert np.sum((histogram - 200) ** 2 / 200) < 27.88  # chi-square, 9 degrees, 99.9 %


def test_same_key_same_task():
    sample = sinusoid.sampler(num_tasks=2, shot=3, query=3)
    first, again, other = (sample(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (first.query["inputs"] != other.query["inputs"]).all()
    assert (first.query["inputs"][:, :3] != first.support["inputs"]).all()


def test_equal_samplers_share_a_trace():
    traces = []

    @jax.jit
    def draw(sample, key):
        traces.append(1)
        return sample(key)

    for seed in range(3):
        draw(sinusoid.sampler(num_tasks=2, shot=3, query=3), jax.random.key(seed))
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["num_tasks", "shot", "query"])
def test_refuses_counts_that_are_not_positive_integers(name):
    counts = {"num_tasks": 1, "shot": 1, "query": 1}
    with pytest.raises(ValueError, match=f"{name} must be an integer, 1 or more; got 0"):
        sinusoid.sampler(**(counts | {name: 0}))
    with pytest.raises(TypeError, match=f"{name} must be an integer, 1 or more; got 2.5"):
        sinusoid.sampler(**(counts | {name: 2.5}))  # pyright: ignore[reportArgumentType]
