"""A preset and options of the commands that train in a second."""

from jaxmaml.experiments import presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.run_dir import make_config

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
