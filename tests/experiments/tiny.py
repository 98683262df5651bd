"""A preset and options of the commands that train in a second, and trainings that are interrupted."""

import contextlib
import itertools
from collections.abc import Iterator

import jax
import pytest

import jaxmaml
from jaxmaml import fitting
from jaxmaml.experiments import candidates, networks, presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import outer_optimizer
from jaxmaml.experiments.run_dir import RunDir, make_config

IMAGE_SHAPE = (4, 4, 1)
PRESET = presets.override(
    presets.get("glyphs-5w1s"),
    way=3, shot=2, query=2, model="mlp", hidden_sizes=(4,), num_tasks=2, num_outer_steps=2,
    num_val_tasks=2,
)  # fmt: skip
"""3-way, for the images of the fixture `images`."""
REGRESSION = presets.override(
    presets.get("sinusoid-5shot"),
    hidden_sizes=(4,), num_tasks=2, num_outer_steps=6, test_query=3, num_val_tasks=5,
    num_validations=2, num_test_inner_steps=2, selection_steps=(),
)  # fmt: skip
AGENT = presets.override(
    presets.get("nav2d"),
    hidden_sizes=(4,), num_tasks=2, num_outer_steps=6, num_trajectories=3, horizon=5,
    num_val_tasks=5, num_validations=2, num_inner_steps=1, num_test_inner_steps=2,
)  # fmt: skip
"""A policy."""
SPECS = [Spec("exact@0.1", "exact", 0.1, "maml"), Spec("anil", "exact", 0.2, "anil")]


def regression_config():
    """The config.json of two runs of REGRESSION."""
    return make_config(
        REGRESSION, SPECS,
        seed=3, num_test_tasks=5, data_dir=None, matmul_precision="highest",
        input_shape=(1,), class_split=None,
    )  # fmt: skip


OPTIONS = [
    *("--hidden-sizes", "4", "--num-tasks", "2", "--num-outer-steps", "6", "--test-query", "3"),
    *("--num-test-tasks", "5", "--num-val-tasks", "5", "--num-validations", "2"),
    *("--num-test-inner-steps", "2", "--selection-steps"),
]
"""Options of `jaxmaml train` and `compare` for the settings of REGRESSION."""


def save_untrained(path, preset, learner="maml", input_shape=IMAGE_SHAPE, data_dir=None):
    """Writes the directory of a run that was never trained, and returns it."""
    spec = candidates.single(preset, learner)
    names = None if preset.is_regression else {"train": list("abc"), "val": ["d"], "test": ["e"]}
    config = make_config(
        preset, [spec],
        seed=3, num_test_tasks=5, data_dir=data_dir, matmul_precision="highest",
        input_shape=input_shape, class_split=names,
    )  # fmt: skip
    directory = RunDir(path)
    directory.create(config)
    directory.save_state(spec.label, initial_state(preset, learner, input_shape), config)
    return directory


def initial_state(preset, learner, input_shape):
    """Returns the state at which a run of one learner starts."""
    network = networks.build(preset, input_shape, jax.random.key(0))
    spec, key = candidates.single(preset, learner), jax.random.key(1)
    num_classes = 0 if preset.is_regression else 3
    candidate = candidates.build(spec, preset, network.model, num_classes, key)
    optimizer = outer_optimizer(preset, network.model)
    return jaxmaml.init_state(candidate.learner, optimizer, network.params, network.state)


@contextlib.contextmanager
def interrupted_after(num_slices: int) -> Iterator[None]:
    """Presses a key in the block when some slices are made, over all of its trainings."""
    run_slices, left = fitting.run_slices, itertools.count(num_slices, -1)

    def interrupted(*args, **options):
        for item in run_slices(*args, **options):
            if next(left) == 0:
                raise KeyboardInterrupt
            yield item

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "run_slices", interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield
