"""`jaxmaml adapt` reads pictures or points and writes predictions and a model, or nothing."""

import csv
import json
import os
import re
import shutil

import numpy as np
import pytest
from data.image_sets import write_folder
from PIL import Image

import jaxmaml
from experiments.tiny import PRESET, REGRESSION, save_untrained
from jaxmaml import cli, files
from jaxmaml.experiments import presets, progress, serving

SHAPE = (6, 6, 3)
PICTURES = presets.override(PRESET, dataset="folder:gone", hidden_sizes=(4,), norm="transductive")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the runs, and with what they adapt to."""
    path = tmp_path_factory.mktemp("serving")
    save_untrained(path / "run", PICTURES, "maml", SHAPE)
    save_untrained(path / "sines", REGRESSION, "maml", (1,))
    write_folder(path / "support", sizes=(2, 1, 3))
    write_folder(path / "new", sizes=(4,))
    (path / "points.csv").write_text("x,y\n0,0\n1,0.8\n2,0.9\n")
    (path / "queries.csv").write_text("x\n0.5\n1.5\n")
    return path


@pytest.fixture
def here(place, tmp_path, monkeypatch):
    """A copy of these files, in the current directory."""
    for name in ("support", "new"):
        shutil.copytree(place / name, tmp_path / name)
    for name in ("points.csv", "queries.csv"):
        shutil.copy(place / name, tmp_path / name)
    for name in ("run", "sines"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def adapt(run, *options, support="support"):
    return cli.main(["adapt", run, "--support", support, *options])


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_pictures_are_classified_one_by_one_as_together(here, capsys):
    assert adapt("run", "--images", "new/class0", "--export", "model") == 0
    line = capsys.readouterr().out
    assert "4 pictures, exact after 3 inner steps" in line
    assert "normalization: the statistics of the support" in line
    together = rows("run-predictions.csv")
    assert [row["file"] for row in together] == [f"{i}.png" for i in range(4)]
    classes = ["class0", "class1", "class2"]
    for row in together:
        values = [float(row[f"p({name})"]) for name in classes]
        assert sum(values) == pytest.approx(1, abs=1e-4)
        assert row["predicted"] == classes[int(np.argmax(values))]
    with Image.open("run-predictions.png") as picture:
        assert picture.size[0] > 200
    assert sorted(path.name for path in (here / "model").iterdir()) == [
        "function.jax", "model.json", "parameters.npz",
    ]  # fmt: skip

    # One at a time.
    options = ["--images", "new/class0/2.png", "--out", "one.csv"]
    assert adapt("run", *options) == 0
    (one,) = rows("one.csv")
    for name in classes:
        assert float(one[f"p({name})"]) == pytest.approx(float(together[2][f"p({name})"]), abs=1e-5)


def test_long_parts_have_lines(here, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert adapt("run", "--images", "new/class0", "--export", "model") == 0
    shown = capsys.readouterr().err
    for what in ("decoding images", "adapting", "predicting", "drawing the picture", "exporting"):
        assert f"{what}" in shown, what


def test_names_may_have_any_bytes(here):
    """Names that are not UTF-8, formulas and lines are written and drawn."""
    names = b"class\xff", b"$x_$", b"two\nlines"
    for i, name in enumerate(names):
        (here / f"support/class{i}").rename(here / "support" / os.fsdecode(name))
        (here / f"new/class0/{i}.png").rename(here / "new/class0" / os.fsdecode(name + b".png"))
    assert adapt("run", "--images", "new/class0") == 0
    found = rows("run-predictions.csv")
    assert {row["file"] for row in found} == {
        "3.png", r"class\udcff.png", "$x_$.png", "two\nlines.png",
    }  # fmt: skip
    assert {row["predicted"] for row in found} <= {r"class\udcff", "$x_$", "two\nlines"}


def test_pictures_are_decoded_as_in_training(here):
    trained = jaxmaml.load("run")
    Image.new("RGBA", (60, 30), (10, 20, 30, 0)).save("clear.png")
    Image.new("L", (6, 6), 128).save("gray.png")
    Image.new("RGB", (60, 30), (10, 20, 30)).save("color.png")
    read = trained.read_images(["clear.png", "gray.png", "color.png"])
    assert read.shape == (3, *SHAPE)
    assert read.dtype == np.uint8
    assert (read[0] == 255).all()
    assert (read[1] == 128).all()
    assert (read[2] == (10, 20, 30)).all()


def test_points_are_predicted(here, capsys):
    assert adapt("sines", "--points", "queries.csv", support="points.csv") == 0
    assert "normalization: no normalization" in capsys.readouterr().out
    found = rows("sines-predictions.csv")
    assert [float(row["x"]) for row in found] == [0.5, 1.5]
    support = {"inputs": [0, 1, 2], "targets": [0, 0.8, 0.9]}
    expected = jaxmaml.load("sines").adapt(support).predict([0.5, 1.5])[:, 0]
    np.testing.assert_allclose([float(row["predicted"]) for row in found], expected, rtol=1e-6)
    assert (here / "sines-predictions.png").stat().st_size > 1000


def _one_class(here):
    shutil.rmtree(here / "support/class1")
    shutil.rmtree(here / "support/class2")


def _broken(here):
    (here / "new/class0/1.png").write_bytes(b"not a picture")


def _broken_support(here):
    (here / "support/class1/0.png").write_bytes(b"not a picture")


def _no_pictures(here):
    shutil.rmtree(here / "new/class0")
    (here / "new/class0").mkdir()


def _floats(here):
    Image.fromarray(np.zeros((6, 6), np.float32)).save(here / "new/class0/9.tiff")


IMAGES = ("--images", "new/class0")
BAD_PICTURES = {
    "one class": (_one_class, IMAGES, "one class only"),
    "an empty class": (lambda here: (here / "support/emu").mkdir(), IMAGES, "support/emu of a class"),
    "too many classes": (
        lambda here: shutil.copytree(here / "new/class0", here / "support/more"), IMAGES,
        "way=4: the run was trained with way=3, .*; use 3 classes at most",
    ),
    "no support": (lambda here: shutil.rmtree(here / "support"), IMAGES, "support does not exist"),
    "no pictures": (_no_pictures, IMAGES, "class0 must hold images"),
    "nested": (lambda here: None, ("--images", "new"), "only pictures directly in it are: class0"),
    "a broken picture": (_broken, IMAGES, "class0/1.png: image cannot be decoded"),
    "a broken support": (_broken_support, IMAGES, "class1/0.png: image cannot be decoded"),
    "a mode": (_floats, IMAGES, "9.tiff: image cannot be decoded: the range of mode 'F'"),
    "no images": (lambda here: None, (), "this run classifies: it needs --images"),
    "points": (lambda here: None, (*IMAGES, "--points", "q"), "--points has no effect"),
    "out": (lambda here: None, (*IMAGES, "--out", "o.txt"), "o.txt must be .* suffix .csv"),
    "another run": (lambda here: None, (*IMAGES, "--run", "x"), "unknown run 'x'"),
    "steps": (lambda here: None, (*IMAGES, "--num-inner-steps", "-1"), "must be an integer, 0 or"),
}  # fmt: skip


def refused(capsys, here, *arguments, **options):
    """Returns the only line that a refused command prints; it has written nothing."""
    before = sorted(here.rglob("*"))
    capsys.readouterr()
    assert adapt(*arguments, **options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert sorted(here.rglob("*")) == before
    return line


@pytest.mark.parametrize(("change", "options", "message"), BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_pictures_that_cannot_be_served_are_one_line(change, options, message, here, capsys):
    change(here)
    line = refused(capsys, here, "run", *options)
    assert re.search(message, line), line


POINTS = ("--points", "queries.csv")
BAD_POINTS = {
    "NaN": (
        "points.csv",
        "x,y\n0,0\n1,nan\n",
        POINTS,
        r"points.csv, line 3: y='nan' is not finite",
    ),
    "text": ("queries.csv", "x\nabc\n", POINTS, r"queries.csv, line 2: x='abc' is not finite"),
    "large": ("queries.csv", "x\n1e39\n", POINTS, r"line 2: x='1e39' is not finite"),
    "columns": ("points.csv", "a,b\n0,0\n", POINTS, r"the columns x,y; it has a,b"),
    "no header": ("points.csv", "0,0\n1,1\n", POINTS, r"the columns x,y; it has 0,0"),
    "cells": ("points.csv", "x,y\n0\n", POINTS, r"line 2 has 1 values for the 2 columns"),
    "no rows": ("queries.csv", "x\n", POINTS, r"queries.csv has no points"),
    "empty": ("queries.csv", "", POINTS, r"the columns x; it has nothing"),
    "images": ("queries.csv", "x\n1\n", IMAGES, r"this run predicts numbers: it needs --points"),
}


@pytest.mark.parametrize(
    ("name", "text", "options", "message"), BAD_POINTS.values(), ids=BAD_POINTS
)
def test_points_that_cannot_be_served_are_one_line(name, text, options, message, here, capsys):
    (here / name).write_text(text)
    line = refused(capsys, here, "sines", *options, support="points.csv")
    assert message in line


def test_an_unfinished_run_is_one_line(here, capsys):
    copy = shutil.copytree(here / "run", here / "copy")
    shutil.rmtree(copy / "checkpoints")
    assert "its training was interrupted" in refused(capsys, here, "copy", *IMAGES)


def test_no_file_is_overwritten_and_none_is_left_of_a_failure(here, monkeypatch, capsys):
    (here / "run-predictions.png").write_bytes(b"mine")
    assert "run-predictions.png exists already" in refused(capsys, here, "run", *IMAGES)
    (here / "run-predictions.png").unlink()

    def full(path):
        raise files.WriteError(f"{path} cannot be written: the disk is full")

    monkeypatch.setattr("jaxmaml.experiments.portable.atomic_directory", full)
    assert "the disk is full" in refused(capsys, here, "run", *IMAGES, "--export", "model")


def test_a_prediction_is_named_after_its_run(tmp_path):
    assert serving.default_out(tmp_path / "a b", None).name == "a-b-predictions.csv"
    assert serving.default_out(tmp_path / "a", "exact@0.1").name == "a-exact-0.1-predictions.csv"


@pytest.mark.slow
def test_the_whole_way_from_a_folder_to_a_model(tmp_path, monkeypatch, capsys):
    """The commands of README, on pictures of noise and with a small network."""
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "pictures", sizes=(4,) * 16)
    own = ["--dataset", "folder:pictures"]
    small = "--model mlp --hidden-sizes 4 --num-outer-steps 4 --num-validations 1 --num-val-tasks 2"
    commands = [
        ["data", "show", "pictures-5w1s", *own, "--out", "shown.png"],
        ["train", "pictures-5w1s", *own, "--out", "RUN", "--num-test-tasks", "4", *small.split()],
        ["evaluate", "RUN", "--shot", "3", "--test-query", "1", "--num-test-tasks", "4"],
    ]
    for command in commands:
        assert cli.main(command) == 0, capsys.readouterr().err
    drawn = json.loads((tmp_path / "RUN/config.json").read_text())["class_split"]
    assert {split: len(names) for split, names in drawn.items()} == {
        "train": 6,
        "val": 5,
        "test": 5,
    }
    for number, name in enumerate(drawn["test"][:4]):
        (tmp_path / "four" / name).mkdir(parents=True)
        (tmp_path / "new").mkdir(exist_ok=True)
        shutil.copy(f"pictures/{name}/0.png", f"four/{name}/0.png")
        shutil.copy(f"pictures/{name}/1.png", f"new/{number}.png")
    # The training data are not needed any more.
    shutil.rmtree("pictures")
    assert adapt("RUN", "--images", "new", "--export", "model", support="four") == 0
    assert len(rows("RUN-predictions.csv")) == 4
