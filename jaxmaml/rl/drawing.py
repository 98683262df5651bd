"""Pictures of the half-cheetah, drawn as lines in the plane in which it moves."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxmaml.rl.adapters import Held, import_extra
from jaxmaml.rl.adapters_brax import make_cheetah
from jaxmaml.types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("0.2", "0.2", *["#0072B2"] * 3, *["#D55E00"] * 3)
"""The colors of the segments: torso and head, then the back leg, then the front leg."""
REACH = 1.1
"""Half the width of a picture, in meters."""


def cheetah_segments(states: Held) -> Array:
    """Returns the ends of the limbs of the half-cheetah in the x-z plane.

    Args:
        states: states of `rl.half_cheetah`, with any leading axes.

    Returns:
        `[..., 8, 2, 2]`: the torso, the head, and from the hip down the three limbs of the back and
        of the front leg; the two ends of each; x and z in meters. The floor is z = 0.

    Raises:
        ImportError: brax is not installed.

    Example:
        >>> import jax
        >>> from jaxmaml import rl
        >>> environment = rl.half_cheetah()
        >>> state, _ = jax.jit(environment.reset)(jax.random.key(0), 1.0)
        >>> rl.cheetah_segments(state).shape
        (8, 2, 2)
    """
    rotate = import_extra("brax.math", "brax").rotate
    model = make_cheetah("spring", 1).sys.mj_model
    capsules = np.flatnonzero(model.geom_bodyid > 0)  # body 0 is the world, with the floor
    links = model.geom_bodyid[capsules] - 1

    # A capsule lies along the z axis of its own frame, which is placed in the frame of its link.
    half_length = model.geom_size[capsules, 1, None] * np.array([-1.0, 1.0])
    along = half_length[..., None] * np.array([0.0, 0.0, 1.0])
    turn = jnp.vectorize(rotate, signature="(3),(4)->(3)")
    ends = model.geom_pos[capsules, None] + turn(along, model.geom_quat[capsules, None])
    frames = states.state.pipeline_state.x
    position, rotation = (leaf[..., links, None, :] for leaf in (frames.pos, frames.rot))
    return (position + turn(ends, rotation))[..., ::2]


def draw_cheetah(segments: Array, titles: Sequence[str] | None = None) -> "Figure":
    """Draws a strip of pictures of the half-cheetah.

    Each picture is centered on the torso. The axis shows where it is.

    Args:
        segments: one picture per row, `[num_pictures, 8, 2, 2]`, as `cheetah_segments` returns them.
        titles: the title of each picture.

    Raises:
        ValueError: `segments` has another shape, or the number of titles is not that of pictures.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmaml import rl
        >>> figure = rl.draw_cheetah(jnp.zeros((3, 8, 2, 2)), ["0 s", "1 s", "2 s"])
        >>> len(figure.axes)
        3
    """
    from matplotlib.figure import Figure

    pictures = np.asarray(segments)
    if pictures.ndim != 4 or pictures.shape[1:] != (len(COLORS), 2, 2) or not len(pictures):
        raise ValueError(
            f"segments must be of shape [num_pictures, {len(COLORS)}, 2, 2]; "
            f"got {list(pictures.shape)}"
        )
    titles = [""] * len(pictures) if titles is None else titles
    if len(titles) != len(pictures):
        raise ValueError(f"{len(pictures)} pictures need as many titles; got {len(titles)}")

    figure = Figure(figsize=(2.2 * len(pictures), 2), layout="constrained")
    rows: Any = figure.subplots(1, len(pictures), sharey=True, squeeze=False)
    for axes, picture, title in zip(rows[0], pictures, titles, strict=True):
        _draw(axes, picture)
        axes.set_title(title, fontsize="small")
    rows[0, 0].set_ylabel("z in m")
    return figure


def _draw(axes: "Axes", picture: np.ndarray) -> None:
    """Draws one picture."""
    axes.axhline(0, color="0.6", linewidth=1)
    for segment, color in zip(picture, COLORS, strict=True):
        axes.plot(*segment.T, color=color, linewidth=3, solid_capstyle="round")
    center = picture[0, :, 0].mean()
    axes.set(
        xlim=(center - REACH, center + REACH), ylim=(-0.15, 1.35), aspect="equal", xlabel="x in m"
    )
