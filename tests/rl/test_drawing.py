"""The limbs of the half-cheetah against MuJoCo's kinematics, and the strip of pictures."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmaml import rl
from jaxmaml.rl import adapters, adapters_brax, drawing


def test_limbs_are_where_mujoco_has_them():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that brax imports
        pytest.importorskip("brax.envs")
    import mujoco
    from brax import kinematics
    from brax.envs import State

    env = adapters_brax.make_cheetah("generalized", 1)
    positions = jax.random.uniform(jax.random.key(0), (3, 9), minval=-0.5, maxval=0.5)
    forward = jax.jit(lambda q: kinematics.forward(env.sys, q, jnp.zeros(9)))

    class Frames:
        x = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[forward(q)[0] for q in positions])

    done = jnp.zeros(3)
    states = adapters.Held(State(Frames, done, done, done), done, done)  # pyright: ignore
    segments = rl.cheetah_segments(states)
    assert segments.shape == (3, 8, 2, 2)

    data = mujoco.MjData(env.sys.mj_model)
    for number, position in enumerate(positions):
        data.qpos[:] = position
        mujoco.mj_forward(env.sys.mj_model, data)
        for limb in range(8):
            # Geom 0 is the floor; the axis of a capsule is the last column of its rotation.
            axis = data.geom_xmat[limb + 1].reshape(3, 3)[:, 2]
            half_length = env.sys.mj_model.geom_size[limb + 1, 1]
            ends = [data.geom_xpos[limb + 1] + sign * half_length * axis for sign in (-1, 1)]
            found = segments[number, limb]
            np.testing.assert_allclose(found, np.stack(ends)[:, [0, 2]], atol=1e-5)


def test_a_strip_shows_every_limb_and_centers_the_torso():
    segments = np.random.default_rng(0).normal(size=(3, 8, 2, 2))
    figure = rl.draw_cheetah(jnp.asarray(segments), ["a", "b", "c"])
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c"]
    for axes, picture in zip(figure.axes, segments, strict=True):
        floor, *limbs = axes.lines
        assert (np.asarray(floor.get_ydata()) == 0).all()
        for line, limb in zip(limbs, picture, strict=True):
            np.testing.assert_allclose(np.stack(line.get_data(), axis=1), limb, rtol=1e-6)
        left, right = axes.get_xlim()
        assert (left + right) / 2 == pytest.approx(picture[0, :, 0].mean(), abs=1e-5)
        assert right - left == pytest.approx(2 * drawing.REACH)


@pytest.mark.parametrize(
    ("shape", "titles", "message"),
    [
        ((8, 2, 2), None, r"must be of shape \[num_pictures, 8, 2, 2\]; got \[8, 2, 2\]"),
        ((0, 8, 2, 2), None, "segments must be of shape"),
        ((2, 7, 2, 2), None, "segments must be of shape"),
        ((2, 8, 2, 2), ["a"], "2 pictures need as many titles; got 1"),
    ],
)
def test_wrong_pictures_are_refused(shape, titles, message):
    with pytest.raises(ValueError, match=message):
        rl.draw_cheetah(jnp.zeros(shape), titles)
