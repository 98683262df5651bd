"""The event files have the rows of metrics.jsonl, each once, also after a run is continued."""

import numpy as np
import pytest

from experiments.tiny import regression_config
from jaxmaml.experiments import event_files
from jaxmaml.experiments.event_files import EventFiles
from jaxmaml.experiments.recorder import Recorder
from jaxmaml.experiments.run_dir import RunDir


def _rows(label, steps):
    """Rows of metrics as a training records them: a validation before every second step."""
    rows = []
    for step in steps:
        if step % 2 == 0:
            rows.append({
                "label": label, "step": step, "val_per_step": [2.0, float(step)],
                "val_ci95_per_step": [0.1, 0.1], "val_num_nonfinite": 0,
            })  # fmt: skip
        values = {"loss": 1.0 / (step + 1), "query_loss": 0.5, "grad_norm": float("nan")}
        rows.append({"label": label, "step": step, **values})
    return rows


def _scalars(path):
    """{tag: [(step, value)]} of an event file, in its order."""
    found = {}
    for event in event_files._read(path):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def _start(directory, said=None, **options):
    files = EventFiles(directory.event_files, "MSE", ([] if said is None else said).append)
    return files, Recorder(directory, regression_config(), sinks=[files], **options)


@pytest.fixture
def directory(tmp_path):
    return RunDir(tmp_path / "run")


def test_every_row_is_an_event(directory):
    files, record = _start(directory)
    record(_rows("a", range(4)))
    found = _scalars(files.path("a"))
    np.testing.assert_allclose(
        found["training/loss"], [(step, 1 / (step + 1)) for step in range(4)]
    )
    assert found["validation/MSE_after_0_inner_steps"] == [(0, 2.0), (2, 2.0)]
    assert found["validation/MSE_after_1_inner_step"] == [(0, 0.0), (2, 2.0)]
    assert all(np.isnan(value) for _, value in found["training/grad_norm"])


def test_nothing_is_written_before_the_first_step(directory):
    files, record = _start(directory)
    record(_rows("a", [0])[:1])
    assert not directory.path.exists()
    record(_rows("a", [0])[1:])
    assert len(_scalars(files.path("a"))["validation/MSE_after_0_inner_steps"]) == 1


def test_the_speed_is_that_since_the_rows_before(tmp_path):
    now = iter([10.0, 14.0])
    files = EventFiles(tmp_path, "MSE", print, clock=lambda: next(now))
    files(_rows("a", range(4)))
    files(_rows("a", range(4, 12)))
    assert _scalars(files.path("a"))["training/steps_per_second"] == [(11, 2.0)]


@pytest.mark.parametrize("damage", ["none", "absent", "torn", "gap", "twice"])
def test_a_continued_run_has_each_step_once(directory, damage):
    files, record = _start(directory)
    record(_rows("a", range(6)) + _rows("b", range(2)))
    path = files.path("a")
    match damage:
        case "absent":
            path.unlink()
        case "torn":
            path.write_bytes(path.read_bytes()[:-7])
        case "gap":
            path.write_bytes(path.read_bytes()[:150])
        case "twice":
            path.write_bytes(path.read_bytes() * 2)
    files, record = _start(directory, is_resumed=True)
    record.cut("a", 3, [0, 2])
    record(_rows("a", range(3, 8)))
    found = _scalars(path)
    assert [step for step, _ in found["training/loss"]] == list(range(8))
    assert [step for step, _ in found["validation/MSE_after_0_inner_steps"]] == [0, 2, 4, 6]
    assert [step for step, _ in _scalars(files.path("b"))["training/loss"]] == [0, 1]
    assert next(event_files._read(path)).file_version == "brain.Event:2"


def test_a_run_that_keeps_no_step_starts_a_new_file(directory):
    files, record = _start(directory)
    record(_rows("a", range(3)))
    files, record = _start(directory, is_resumed=True)
    record.cut("a", 0, [])
    assert not files.path("a").exists()
    record(_rows("a", range(2)))
    assert [step for step, _ in _scalars(files.path("a"))["training/loss"]] == [0, 1]


def test_training_goes_on_without_a_file_that_cannot_be_written(directory):
    said = []
    _, record = _start(directory, said)
    record(_rows("a", range(2)))
    (directory.event_files / "b").write_text("a file")
    record(_rows("b", range(2)))
    record(_rows("b", range(2, 4)))
    assert len(said) == 1
    assert "cannot be written" in said[0]
    assert "training goes on without it" in said[0]
    steps = [row["step"] for row in directory.read_metrics("b")]
    assert steps == [0, 0, 1, 2, 2, 3]
