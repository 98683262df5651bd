"""The command for datasets."""

import pathlib
from collections.abc import Callable
from typing import Any

from jaxmaml.commands.mistakes import SUCCESS, check_matplotlib, user_errors
from jaxmaml.commands.session import session
from jaxmaml.experiments import options, presets
from jaxmaml.experiments.options import List, Prepare, Show, Split


def data(action: options.Action) -> int:
    """Show, list and prepare datasets, and divide their classes."""
    actions: dict[type, Callable[[Any], int]] = {
        Show: _show, List: _list, Prepare: _prepare, Split: _split
    }  # fmt: skip
    return actions[type(action)](action)


def _show(action: Show) -> int:
    check_matplotlib()
    from jaxmaml.experiments import learners
    from jaxmaml.experiments.experiment import build_experiment
    from jaxmaml.experiments.figures import draw_episode
    from jaxmaml.experiments.plots import check_format
    from jaxmaml.experiments.progress import Display

    with user_errors():
        chosen = options.chosen_preset(action.preset, action.preset_settings)
        learners.check_used(chosen, options.given(action.preset_settings), [])
        options.check_data_dir(chosen.dataset, action.data_dir)
        path = action.out or pathlib.Path(f"{presets.file_name(chosen)}.png")
        check_format(path)
    with user_errors(), session("highest"), Display():
        built = build_experiment(
            chosen, seed=0, data_dir=action.data_dir, num_test_tasks=1, splits=("test",)
        )
        draw_episode(built, path)
    print(path)
    return SUCCESS


def _list(action: List) -> int:
    from jaxmaml.data import datasets, preparation
    from jaxmaml.experiments import tables
    from jaxmaml.experiments.progress import Display

    with user_errors(), Display():
        directory = datasets.data_directory(action.data_dir)
        found = preparation.listing(action.data_dir)
    if not found:
        print(f"nothing is prepared in {directory}")
        return SUCCESS
    tables.console().print(tables.datasets_table(found, str(directory)))
    return SUCCESS


def _prepare(action: Prepare) -> int:
    from jaxmaml.data import preparation
    from jaxmaml.experiments.progress import Display

    with user_errors(), Display():
        directory = preparation.prepare(action.dataset, action.data_dir, action.archive_dir)
    print(directory)
    return SUCCESS


def _split(action: Split) -> int:
    from jaxmaml.data import class_splits, datasets
    from jaxmaml.experiments.progress import Display

    with user_errors(), Display():
        options.check_data_dir(action.dataset, action.data_dir)
        names = datasets.class_names(action.dataset, action.data_dir)
        listed = class_splits.draw(names, action.fractions, action.seed)
        about = {"dataset": action.dataset, "fractions": action.fractions, "seed": action.seed}
        class_splits.write(action.out, listed, **about)
    sizes = ", ".join(f"{len(names)} {split}" for split, names in listed.items())
    print(f"{action.out}: {sizes} (--way {min(map(len, listed.values()))} at most)")
    return SUCCESS
