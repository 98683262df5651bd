"""A comparison: a whole run directory, the same tasks for every run, both meta-gradients watched."""

import json
import shutil

import jax
import numpy as np
import pytest
from data.image_sets import write_folder

from experiments.tiny import PRESET, REGRESSION
from jaxmaml import fitting
from jaxmaml.experiments import candidates, compare, presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.run_dir import write_json
from jaxmaml.files import json_digest


def _rows(comparison):
    return [json.loads(line) for line in comparison.run_dir.metrics.read_text().splitlines()]


def test_a_comparison_writes_a_whole_run_directory(compared):
    comparison, _ = compared
    assert sorted(path.name for path in comparison.run_dir.path.iterdir()) == [
        "checkpoints", "config.json", "gradient_agreement.png", "learning_curves.png",
        "metric_per_step.png", "metrics.jsonl", "regression.png", "results.json", "training",
    ]  # fmt: skip


def test_both_orders_start_alike_and_see_the_same_tasks(compared):
    comparison, runs = compared
    losses = [row["loss"] for row in _rows(comparison) if row["step"] == 0 and "loss" in row]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    starts = [run.curve[0][1].mean for run in runs]
    np.testing.assert_allclose(*starts, rtol=1e-6)
    assert runs[0].flops > runs[1].flops


def test_the_gradients_are_compared_along_the_exact_run(compared):
    comparison, _ = compared
    gradient = json.loads(comparison.run_dir.results.read_text())["gradient"]
    assert gradient["step"] == list(range(7))
    # One small inner step: both gradients agree well, and not fully.
    assert all(0.9 < cosine < 1 - 1e-9 for cosine in gradient["cosine"])


def test_the_states_of_the_runs_are_saved(compared):
    comparison, runs = compared
    for run in runs:
        found = comparison.run_dir.restore_state(run.label, run.meta_state, comparison.config)
        jax.tree.map(np.testing.assert_array_equal, found, run.meta_state)


def _watched(tmp_path, specs):
    with compare.prepare(REGRESSION, specs, tmp_path / "run", num_test_tasks=2) as comparison:
        watch = compare._watch(comparison)
    return watch and (watch.exact.label, watch.first.label)


def test_the_pair_nearest_to_the_rate_of_the_preset_is_watched(tmp_path):
    specs = candidates.comparison(REGRESSION, [1.0, 0.02, 0.1])
    assert _watched(tmp_path, specs) == ("exact@0.02", "first@0.02")


def test_any_learner_with_both_orders_is_watched(tmp_path):
    specs = [Spec("a", "first", 0.1, "anil"), Spec("b", "exact", 0.1, "anil")]
    assert _watched(tmp_path, specs) == ("b", "a")


def test_runs_that_differ_in_more_than_the_order_are_not_watched(tmp_path):
    specs = [
        Spec("a", "first", 0.1, "anil"), Spec("b", "exact", 0.2, "anil"),
        Spec("c", "exact", 0.1, "maml"),
    ]  # fmt: skip
    assert _watched(tmp_path, specs) is None


@pytest.mark.parametrize(
    ("changes", "specs", "message"),
    [
        ({}, [Spec("a", "exact", 0.1, "protonet")], "'protonet' is for classification"),
        (
            {"dataset": "omniglot", "way": 3},
            [Spec("a", "exact", 0.1)],
            "jaxmaml data prepare omniglot",
        ),
    ],
)
def test_a_mistake_leaves_no_directory(changes, specs, message, tmp_path):
    preset = presets.override(REGRESSION, **changes)
    prepared = compare.prepare(preset, specs, tmp_path / "a" / "run", data_dir=tmp_path)
    with pytest.raises(ValueError, match=message), prepared:
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["compile_program", "run_slices"])
def test_a_start_that_fails_leaves_nothing_that_blocks_the_next(failing, tmp_path, monkeypatch):
    """The first validation is made, but no outer step."""

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    out, specs = tmp_path / "new" / "run", [Spec("a", "exact", 0.1)]
    monkeypatch.setattr(fitting, failing, fail)
    with (
        pytest.raises(KeyboardInterrupt),
        compare.prepare(REGRESSION, specs, out, num_test_tasks=2) as comparison,
    ):
        compare.execute(comparison)
    assert not list(tmp_path.iterdir())


def test_a_directory_is_kept_from_other_processes(tmp_path):
    specs = [Spec("a", "exact", 0.1)]
    with compare.prepare(REGRESSION, specs, tmp_path, num_test_tasks=2):
        second = compare.prepare(REGRESSION, specs, tmp_path, num_test_tasks=2)
        with pytest.raises(ValueError, match="in use by another process"), second:
            pass


def test_two_runs_of_one_label_are_refused_before_training(tmp_path):
    specs = [Spec("a", "exact", 0.1), Spec("a", "exact", 0.2)]
    with pytest.raises(ValueError, match="labels of runs must differ"):
        compare.prepare(REGRESSION, specs, tmp_path / "run").__enter__()


def test_classes_that_were_drawn_stay_when_the_folder_grows(tmp_path):
    write_folder(tmp_path / "images", sizes=(4,) * 7, side=4)
    preset = presets.override(
        PRESET, way=2, shot=1, query=1, test_query=1, image_size=4,
        dataset=f"folder:{tmp_path / 'images'}",
    )  # fmt: skip
    specs, out = candidates.comparison(preset)[:1], tmp_path / "run"
    with compare.prepare(preset, specs, out) as comparison:
        comparison.run_dir.create(comparison.config)
    before = comparison.config["class_split"]
    assert set(before) == {"train", "val", "test"}
    shutil.copytree(tmp_path / "images" / "class0", tmp_path / "images" / "a new class")
    with compare.prepare(preset, specs, out) as comparison:
        assert comparison.is_resumed
        assert comparison.config["class_split"] == before

    # A class of the run that has other pictures is named; a version that kept no numbers has no say.
    (tmp_path / "images" / "class1" / "0.png").unlink()
    with (
        pytest.warns(UserWarning, match="1 of 7 classes .* such as 'class1', 4 then and 3 now$"),
        compare.prepare(preset, specs, out) as comparison,
    ):
        assert comparison.is_resumed
    config = {name: comparison.config[name] for name in comparison.config if name != "digest"}
    del config["class_sizes"]
    write_json(comparison.run_dir.config, {**config, "digest": json_digest(config)})
    with compare.prepare(preset, specs, out) as comparison:
        assert comparison.is_resumed
