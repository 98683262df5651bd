"""The options of the command line."""

import dataclasses

import pytest

from jaxmaml.experiments import options, presets, settings


def _given(**values):
    """The settings in which some are given."""
    changes = {}
    for name, value in values.items():
        group = settings.options()[name].metadata["group"].replace(" ", "_")
        before = changes.get(group, getattr(options.UNCHANGED, group))
        changes[group] = dataclasses.replace(before, **{name: value})
    return dataclasses.replace(options.UNCHANGED, **changes)


def test_every_setting_of_a_preset_is_an_option_and_keeps_its_value():
    groups = dataclasses.asdict(options.UNCHANGED)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(settings.options())
    for preset in presets.PRESETS.values():
        assert options.chosen_preset(preset.name, options.UNCHANGED) == preset


def test_a_given_setting_replaces_that_of_the_preset():
    given = _given(way=3, inner_lr=0.1)
    chosen = options.chosen_preset("glyphs-5w1s", given)
    assert chosen == dataclasses.replace(presets.get("glyphs-5w1s"), way=3, inner_lr=0.1)


def test_a_setting_out_of_range_is_refused():
    with pytest.raises(ValueError, match="way must be an integer, 1 or more"):
        options.chosen_preset("glyphs-5w1s", _given(way=0))


def test_the_options_of_other_tasks_are_settings_of_a_preset():
    names = {field.name for field in dataclasses.fields(options.TaskOptions)}
    assert names < set(settings.options())
    assert all(value is None for value in dataclasses.asdict(options.TaskOptions()).values())
