"""The recipes of benchmarks/ablations.py and benchmarks/family.py are settings that exist."""

import importlib
import sys
from pathlib import Path

import pytest

from jaxmaml.experiments import learners, presets, settings

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

ablations = importlib.import_module("ablations")
family = importlib.import_module("family")


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_every_variant_changes_something_that_has_an_effect(name):
    learner, changes = ablations.resolved(name)
    variant, preset = ablations.VARIANTS[name], presets.get("omniglot-5w1s")
    changed = presets.override(preset, **changes)
    learners.check(changed, learner, "exact")
    learners.check_used(changed, variant.changes, [learner])
    if variant.of:
        of_learner, of_changes = ablations.resolved(variant.of)
        assert (learner, changed) != (of_learner, presets.override(preset, **of_changes))


@pytest.mark.parametrize("preset", ["glyphs-5w1s", "omniglot-5w1s"])
@pytest.mark.parametrize("name", [*learners.of_domain("classification"), *learners.ALIASES])
def test_the_settings_of_a_learner_have_an_effect(name, preset):
    changed = presets.override(presets.get(preset), **family.SUITED.get(name, {}))
    learners.check_used(changed, family.SUITED.get(name, {}), [learners.resolve(name)[0]])
    assert all(setting in settings.options() for setting in family.SUITED.get(name, {}))
