"""Drawing functions for policies: trajectories in a plane, and probabilities of actions.

As in `plots`, every function takes plain numbers and returns a matplotlib `Figure`.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from jaxmaml.experiments.plots import LEARNER_COLORS

PANEL_INCHES = 2.4
SEEN_FRACTION = 0.15
"""The part of the width of a panel that is left free around what it shows."""


def trajectories(tasks: Sequence[Mapping[str, np.ndarray]], goals: np.ndarray) -> Figure:
    """Draws trajectories in a plane: one row per task, one panel per stage of the adaptation.

    All panels show the same part of the plane.

    Args:
        tasks: for each task, stage -> positions `[num_trajectories, num_steps, 2]`, with NaN after
            the end of a trajectory. The stages are those of the first task.
        goals: `[num_tasks, 2]`.

    >>> figure = trajectories([{"before": np.zeros((3, 5, 2))}], np.ones((1, 2)))
    >>> figure.axes[0].get_title()
    'before'
    """
    stages = list(tasks[0])
    figure, panels = _panels(len(tasks), len(stages))
    limits = _limits([positions for task in tasks for positions in task.values()], goals)
    for row, (task, goal) in enumerate(zip(tasks, goals, strict=True)):
        for column, stage in enumerate(stages):
            axes = panels[row, column]
            _draw_trajectories(axes, task[stage], goal)
            axes.set(xlim=limits[0], ylim=limits[1], aspect="equal", xticks=[], yticks=[])
            axes.set_title(stage if row == 0 else "", fontsize="medium")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def action_probabilities(stages: Mapping[str, np.ndarray], rewards: np.ndarray) -> Figure:
    """Draws the probability of each action in each state, beside the mean rewards of the task.

    Args:
        stages: stage -> probabilities `[num_states, num_actions]`, in the order of adaptation.
        rewards: the mean rewards, of the same shape.

    >>> figure = action_probabilities({"before": np.full((2, 3), 1 / 3)}, np.ones((2, 3)))
    >>> [axes.get_title() for axes in figure.axes[:2]]
    ['mean reward', 'before']
    """
    num_rows = -(-(len(stages) + 1) // 3)
    figure, panels = _panels(num_rows, min(len(stages) + 1, 3))
    spare = panels.ravel()[len(stages) + 1 :]
    first, *others = panels.ravel()[: len(stages) + 1]
    shown = _draw_matrix(first, "mean reward", rewards, "viridis", None)
    figure.colorbar(shown, ax=first, shrink=0.8)
    for axes, (stage, probabilities) in zip(others, stages.items(), strict=True):
        shown = _draw_matrix(axes, stage, probabilities, "Blues", (0, 1))
    figure.colorbar(shown, ax=others, shrink=0.8, label="probability")
    for axes in spare:
        axes.set_axis_off()
    return figure


def _panels(num_rows: int, num_columns: int) -> tuple[Figure, np.ndarray]:
    size = (PANEL_INCHES * num_columns + 0.3, PANEL_INCHES * num_rows + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def _limits(positions: Sequence[np.ndarray], goals: np.ndarray) -> np.ndarray:
    """The square around all points, as (x limits, y limits)."""
    points = np.concatenate([*(found.reshape(-1, 2) for found in positions), goals])
    low, high = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
    half = (0.5 + SEEN_FRACTION) * max(*(high - low), 1e-3)
    center = (low + high) / 2
    return np.stack([center - half, center + half], axis=1)


def _draw_trajectories(axes: Axes, positions: np.ndarray, goal: np.ndarray) -> None:
    shades = matplotlib.colormaps["cividis"](np.linspace(0.15, 0.85, len(positions)))
    for shade, found in zip(shades, positions, strict=True):
        axes.plot(*found.T, color=shade, linewidth=0.8, marker=".", markersize=2, alpha=0.8)
    axes.plot(*positions[0, 0], "o", color="black", markersize=5, label="start")
    axes.plot(
        *goal, "*", color=LEARNER_COLORS["first"], markersize=12, label="goal",
        markeredgecolor="white", markeredgewidth=0.6, zorder=3,
    )  # fmt: skip


def _draw_matrix(
    axes: Axes, title: str, values: np.ndarray, colors: str, limits: tuple[float, float] | None
) -> ScalarMappable:
    low, high = limits or (None, None)
    shown = axes.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto")
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel="action", ylabel="state", xticks=range(values.shape[1]))
    axes.set_yticks(range(values.shape[0]))
    return shown
