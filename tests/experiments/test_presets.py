"""Presets state the settings of their papers, in the units of a mean loss."""

import dataclasses
import re
from pathlib import Path

import pytest

from jaxmaml.data import datasets
from jaxmaml.experiments import presets, settings


def test_the_presets_that_the_documents_name_exist():
    root = Path(__file__).resolve().parents[2]
    text = "".join((root / name).read_text() for name in ("README.md", "benchmarks/README.md"))
    named_so = "|".join([*datasets.DATASETS, "sinusoid", "pictures"])
    agents = re.findall(
        r"\b(?:nav2d-paper|nav2d-script|tabular-mdp|cheetah-dir|cheetah-vel)\b", text
    )
    assert set(agents) <= set(presets.PRESETS)
    named = set(re.findall(rf"\b(?:{named_so})-(?:mlp-)?\d+(?:w\d+s|shot)\b", text))
    assert len(named) >= 4
    assert named <= set(presets.PRESETS)


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=lambda preset: preset.name)
def test_a_name_states_dataset_way_and_shot(preset):
    assert presets.get(preset.name) is preset
    dataset = "pictures" if preset.dataset == "folder:" else preset.dataset
    assert preset.name.startswith(dataset)
    if preset.domain == "reinforcement":
        return
    size = preset.name.removesuffix("-best").rpartition("-")[2]
    expected = f"{preset.shot}shot" if preset.is_regression else f"{preset.way}w{preset.shot}s"
    assert size == expected
    assert ("mlp" in preset.name or preset.is_regression) == (preset.model == "mlp")


@pytest.mark.parametrize("preset", presets.PRESETS.values(), ids=lambda preset: preset.name)
def test_every_preset_is_valid_and_documented(preset):
    assert presets.override(preset) == preset
    assert all([preset.paper, preset.table, preset.expected, preset.cost])


@pytest.mark.parametrize(
    ("name", "summed_rate", "num_inner_steps", "num_test_inner_steps", "num_tasks"),
    [
        ("omniglot-5w1s", 0.4, 1, 3, 32),
        ("omniglot-5w5s", 0.4, 1, 3, 32),
        ("omniglot-20w1s", 0.1, 5, 5, 16),
        ("omniglot-20w5s", 0.1, 5, 5, 16),
    ],
)
def test_omniglot_is_the_papers_protocol(
    name, summed_rate, num_inner_steps, num_test_inner_steps, num_tasks
):
    preset = presets.get(name)
    # The authors sum over way*shot examples and divide by the shot.
    assert preset.inner_lr == pytest.approx(summed_rate * preset.way)
    assert preset.num_inner_steps == num_inner_steps
    assert preset.num_test_inner_steps == preset.headline_step == num_test_inner_steps
    assert preset.num_tasks == num_tasks
    assert preset.query == preset.test_query == preset.shot
    assert preset.outer_lr == 1e-3
    assert preset.num_outer_steps == 60_000
    assert preset.rotate_train
    assert preset.rotate_test
    assert not preset.norm_scale
    assert not preset.adapt_norm
    assert preset.head_scale == 1.0


def test_mini_imagenet_is_the_papers_protocol():
    for shot, num_tasks in ((1, 4), (5, 2)):
        preset = presets.get(f"mini-imagenet-5w{shot}s")
        assert preset.inner_lr == pytest.approx(0.01 * preset.way)
        assert (preset.num_inner_steps, preset.num_test_inner_steps) == (5, 10)
        assert (preset.num_tasks, preset.num_filters, preset.query) == (num_tasks, 32, 15)
        assert preset.pooled
        assert preset.outer_clip == 10


def test_pictures_need_no_other_pictures_and_four_per_class():
    preset = presets.get("pictures-5w1s")
    assert preset.norm in ("layer", "group")
    assert (preset.image_size, preset.flip, preset.crop > 0) == (32, True, True)
    assert preset.shot + max(preset.query, preset.test_query) <= 4


def test_every_option_has_a_help_text():
    names = {field.name for field in dataclasses.fields(presets.Preset)}
    assert set(settings.options()) == names - {"name", *settings.DOCUMENTATION}
    assert all(field.metadata["help"] for field in settings.options().values())


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown preset .* did you mean 'glyphs-5w1s'\?"):
        presets.get("Glyph-5W1S")


def test_no_preset_is_suggested_for_a_name_that_resembles_none():
    with pytest.raises(ValueError, match="unknown preset 'xyz': Known are sinusoid-5shot"):
        presets.get("xyz")


def test_another_dataset_has_its_own_class_split():
    preset = presets.get("glyphs-5w1s")
    assert presets.override(preset, dataset="folder:x").split == ""
    assert presets.override(preset, dataset="omniglot", split="vinyals").split == "vinyals"
    assert presets.override(preset, dataset="glyphs").split == "script"


def test_a_title_states_what_is_tested():
    preset = presets.get("glyphs-5w1s")
    assert presets.title(preset) == "glyphs-5w1s"
    assert presets.title(presets.override(preset, outer_lr=0.1)) == "glyphs-5w1s"
    other = presets.override(preset, dataset="omniglot", shot=5)
    assert presets.title(other) == "glyphs-5w1s, dataset=omniglot, shot=5"


def test_fewer_test_steps_move_the_headline_and_the_selection():
    preset = presets.override(presets.get("sinusoid-5shot"), num_test_inner_steps=5)
    assert preset.headline_step == 5
    assert preset.selection_steps == (1, 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_outer_steps", 0),
        ("num_inner_steps", -1),
        ("way", 0),
        ("chunk_size", 0),
        ("chunk_size", "some"),
        ("headline_step", 4),
        ("selection_steps", (4,)),
        ("inner_lr", float("nan")),
        ("averaging", 1.0),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        presets.override(presets.get("glyphs-5w1s"), **{name: value})


def test_a_count_that_is_not_an_integer_is_named():
    with pytest.raises(TypeError, match=r"^way must be an integer, 1 or more; got 2\.5"):
        presets.override(presets.get("glyphs-5w1s"), way=2.5)


def test_zero_inner_steps_are_valid():
    assert presets.override(presets.get("glyphs-5w1s"), num_inner_steps=0).num_inner_steps == 0
