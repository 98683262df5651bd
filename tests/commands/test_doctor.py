"""The commands that say what there is."""

import pytest

from jaxmaml import cli
from jaxmaml.experiments import availability, presets, settings


def _output(capsys, *arguments):
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out


def test_the_settings_of_a_preset_are_those_that_have_an_effect(capsys):
    text = _output(capsys, "presets", "sinusoid-5shot")
    preset = presets.get("sinusoid-5shot")
    for name in settings.options():
        option = f"--{name.replace('_', '-')} "
        assert (option in text) == (not settings.why_unused(preset, name)), option
    row = next(line for line in text.splitlines() if "--hidden-sizes" in line)
    assert row.split()[-2:] == ["40", "40"]


def test_an_unknown_preset_is_a_mistake(capsys):
    assert cli.main(["presets", "sinusoid-5shots"]) == 2
    assert "did you mean 'sinusoid-5shot'" in capsys.readouterr().err


def test_the_doctor_names_versions_devices_caches_and_what_presets_need(capsys, tmp_path):
    text = _output(capsys, "doctor", "--data-dir", str(tmp_path))
    assert availability.versions()["jax"] in text
    assert "cpu" in text
    assert "compiled programs" in text
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    needs = {line[0]: line[1].strip() for line in lines if line and line[0] in presets.PRESETS}
    assert set(needs) == set(presets.PRESETS)
    assert needs["glyphs-5w1s"] == needs["nav2d"] == "ready"
    assert needs["omniglot-5w1s"] == "jaxmaml data prepare omniglot"


@pytest.mark.parametrize("parent", ["a", "long" * 30])
def test_a_dataset_that_cannot_be_read_is_not_ready(parent, capsys, tmp_path):
    tmp_path = tmp_path / parent
    version = tmp_path / "omniglot" / "3.0.0"
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text('{"fileFormat": "tfrecord"}')
    text = _output(capsys, "doctor", "--data-dir", str(tmp_path))
    # However long the path of the directory is, it takes no room from what the row says.
    assert "another format than ArrayRecord" in " ".join(text.split())
    row = next(line for line in text.splitlines() if "omniglot-5w1s" in line)
    assert "jaxmaml data prepare omniglot" in row


def test_the_doctor_sees_prepared_data(capsys, test_data):
    text = _output(capsys, "doctor", "--data-dir", str(test_data))
    assert "1,623 classes" in text
    row = next(line for line in text.splitlines() if "omniglot-5w1s" in line)
    assert row.split()[-1] == "ready"


@pytest.mark.parametrize("is_there", [True, False])
def test_a_preset_names_the_extra_that_it_needs(is_there, monkeypatch):
    monkeypatch.setattr(availability, "_is_installed", lambda module: is_there)
    wanted = "" if is_there else "pip install 'jaxmaml[brax]'"
    assert availability.missing(presets.get("cheetah-dir"), ()) == wanted
