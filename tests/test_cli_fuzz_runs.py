"""Random command lines of `adapt` and `report`: exit code 0 or 2, no traceback, all files or none.

Everything runs as for a user, except that nothing is compiled or drawn and that predictions are equal.
"""

import functools
import io
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import pytest
from data.image_sets import write_folder
from experiments.tiny import PRESET, REGRESSION, initial_state, save_untrained
from hypothesis import strategies as st

from jaxmaml import cli
from jaxmaml.experiments import candidates, gallery, presets, trained
from jaxmaml.experiments.report import pictures
from jaxmaml.experiments.report.blocks import Picture
from jaxmaml.experiments.run_dir import RunDir, make_config

PICTURES = presets.override(PRESET, dataset="folder:gone", hidden_sizes=(4,), norm="transductive")
RUNS = ["pictures", "sines", "seeds"]
STRANGE_RUNS = ["nowhere", "support", "points.csv", "", "x" * 999, "broken run"]
STRANGE = ["-1", "0", "nan", "1e9", "", " ", "x", "é ± ∞", "[bold]", "--", "a\x00b", "no/a.csv"]
INPUTS = [
    "support",
    "support/class0",
    "support/class0/0.png",
    "points.csv",
    "queries.csv",
    "broken",
]
USUAL = {
    "support": INPUTS, "images": INPUTS, "points": INPUTS,
    "out": ["a.csv", "a.png", "support", "taken.csv", "deep/er/a.csv"],
    "run": ["exact", "anil", "exact, seed 0"], "num_inner_steps": ["0", "1", "3"],
    "statistics": ["support", "batch"], "export": ["model", "support", "a.csv"],
}  # fmt: skip
"""Values of each option of `adapt` that somebody could give."""


@st.composite
def adapt_lines(draw: st.DrawFn) -> list[str]:
    """Draws the arguments of `adapt`; often such that a few changes are accepted."""
    run = draw(st.sampled_from(RUNS if draw(st.integers(0, 5)) else STRANGE_RUNS))
    given = {}
    if draw(st.integers(0, 3)):
        given = {"support": "points.csv", "points": "queries.csv"}
        if run == "pictures":
            given = {"support": "support", "images": "support/class1"}
        if run == "seeds":
            given["run"] = "exact, seed 1"
    for option in draw(st.lists(st.sampled_from(list(USUAL)), max_size=3, unique=True)):
        usual = USUAL[option] if draw(st.integers(0, 4)) else STRANGE
        given[option] = draw(st.sampled_from(usual))
    words = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
    return ["adapt", run, *(word for pair in words for word in pair)]


@st.composite
def report_lines(draw: st.DrawFn) -> list[str]:
    """Draws the arguments of `report`."""
    runs = RUNS if draw(st.integers(0, 2)) else [*RUNS, *STRANGE_RUNS]
    out = ["--out", draw(st.sampled_from(["page", "support", "points.csv", *STRANGE]))]
    named = draw(st.lists(st.sampled_from(runs), max_size=3))
    return ["report", *named, *(out if draw(st.booleans()) else [])]


def _untrained(real: Any, *args: Any) -> trained._Served:
    """Stands for `trained._serve`: checks what is adapted to, and predicts that all is equal."""
    served, way = real(*args), args[4]

    def adapt(params, state, batch):
        jax.eval_shape(served.adapt, params, state, batch)
        return params, state

    return trained._Served(adapt, lambda params, state, x: jnp.full((x.shape[0], way), 1 / way))


def _save_seeds(path: Path) -> None:
    """Writes a directory of two runs that differ in their seed."""
    specs = candidates.for_each_seed([candidates.single(REGRESSION, "maml")], 0, 2)
    config = make_config(
        REGRESSION, specs,
        seed=0, num_test_tasks=5, data_dir=None, matmul_precision="highest", input_shape=(1,),
        class_split=None,
    )  # fmt: skip
    directory = RunDir(path)
    directory.create(config)
    for spec in specs:
        directory.save_state(spec.label, initial_state(REGRESSION, "maml", (1,)), config)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The current directory, with runs and with what they adapt to; nothing is compiled or drawn."""
    path = tmp_path_factory.mktemp("place")
    save_untrained(path / "pictures", PICTURES, "maml", (6, 6, 3))
    save_untrained(path / "sines", REGRESSION, "maml", (1,))
    _save_seeds(path / "seeds")
    write_folder(path / "support", sizes=(2, 1, 3))
    for name in ("broken", "broken run"):
        (path / name / "class0").mkdir(parents=True)
    (path / "broken/class0/0.png").write_bytes(b"no picture")
    (path / "broken run/config.json").write_text("{")
    (path / "points.csv").write_text("x,y\n0,0\n1,0.8\n2,0.9\n")
    (path / "queries.csv").write_text("x\n0.5\n1.5\n")
    (path / "taken.csv").write_text("mine")

    real = trained._serve
    picture = lambda name, caption, figure, alt: Picture(name, caption, alt, b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(trained, "_serve", lambda *args: _untrained(real, *args))
        patch.setattr(trained, "load", functools.cache(trained.load))
        patch.setattr(gallery, "png", lambda figure: b"picture")
        patch.setattr(pictures, "_picture", picture)
        yield path


def _run(arguments: list[str]) -> tuple[int, str, str]:
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()  # pyright: ignore[reportReturnType]


def _entries(path: Path) -> set[Path]:
    return {entry for entry in path.rglob("*") if not entry.is_relative_to(path / "xla")}


def _check(place: Path, arguments: list[str]) -> int:
    """Checks a command, removes the files that it wrote, and returns its exit code."""
    before = _entries(place)
    code, out, err = _run(arguments)
    assert code in (0, 2), err
    assert "Traceback" not in err
    assert "x" * 500 not in err
    made = _entries(place) - before
    assert bool(made) == (code == 0), (made, err)
    if code == 0 and arguments[0] == "adapt":
        listed = re.split(", ", out.rsplit("written to ", 1)[1].strip())
        assert all(Path(name).exists() for name in listed)
        assert len(listed) == (3 if "--export" in arguments else 2)
    if code == 0 and arguments[0] == "report":
        assert Path(out.strip()).is_file()
    for entry in sorted(made, reverse=True):
        entry.rmdir() if entry.is_dir() else entry.unlink()
    return code


@hypothesis.settings(max_examples=15)
@hypothesis.given(arguments=adapt_lines())
def test_an_adaptation_writes_all_or_nothing(place, arguments):
    _check(place, arguments)


@hypothesis.settings(max_examples=8)
@hypothesis.given(arguments=report_lines())
def test_a_report_is_written_or_refused(place, arguments):
    _check(place, arguments)


@pytest.mark.slow
@hypothesis.settings(max_examples=400)
@hypothesis.given(arguments=adapt_lines() | report_lines())
def test_hundreds_of_lines_write_all_or_nothing(place, arguments):
    _check(place, arguments)


def test_the_lines_are_accepted_and_refused(place):
    """The stand-ins let a line of each kind of run through."""
    images = ["--support", "support", "--images", "support/class1"]
    points = ["--support", "points.csv", "--points", "queries.csv"]
    assert _check(place, ["adapt", "pictures", *images, "--export", "model"]) == 0
    assert _check(place, ["adapt", "sines", *points]) == 0
    assert _check(place, ["adapt", "seeds", *points]) == 2
    assert _check(place, ["adapt", "seeds", *points, "--run", "exact, seed 1"]) == 0
    assert _check(place, ["report", *RUNS]) == 0
