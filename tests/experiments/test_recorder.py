"""The recorder: nothing before the first step, every row in the end."""

import json

import pytest

from experiments.tiny import regression_config
from jaxmaml import files
from jaxmaml.experiments.recorder import Recorder
from jaxmaml.experiments.run_dir import RunDir


def test_nothing_is_written_before_the_first_outer_step(tmp_path):
    directory = RunDir(tmp_path)
    record = Recorder(directory, regression_config())
    record([{"step": 0, "val_per_step": [1.0]}])
    assert not list(tmp_path.iterdir())
    record([{"step": 0, "loss": 1.0}])
    record([{"step": 1, "val_per_step": [1.0]}])
    assert directory.read_config() == regression_config()
    assert len(directory.metrics.read_text().splitlines()) == 3


def test_a_disk_that_is_full_at_the_start_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, rows):
        self.metrics.touch()
        raise files.WriteError("full")

    record = Recorder(RunDir(tmp_path), regression_config())
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "append_metrics", fail)
        with pytest.raises(files.WriteError):
            record([{"step": 0, "loss": 1.0}])
    assert not list(tmp_path.iterdir())


def test_rows_are_kept_while_the_disk_is_full(tmp_path, monkeypatch):
    said = []
    record = Recorder(RunDir(tmp_path), regression_config(), say=said.append)
    record([{"label": "a", "step": 0, "loss": 1.0}])

    def fail(self, rows):
        raise files.WriteError("full")

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "append_metrics", fail)
        for step in (1, 2):
            record([{"label": "a", "step": step, "loss": 1.0}])
        assert not record.is_written
        with pytest.raises(files.WriteError):
            record.finish()
    assert said == ["full: training goes on, and its rows are kept"]
    record([{"label": "a", "step": 3, "loss": 1.0}])
    assert record.is_written
    lines = RunDir(tmp_path).metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]


def test_the_rows_of_one_run_are_cut(tmp_path):
    record = Recorder(RunDir(tmp_path), regression_config())
    rows = [
        {"label": label, "step": step, kind: 1.0}
        for label in ("a", "b")
        for step in range(3)
        for kind in ("loss", "val_per_step")
    ]
    record(rows)
    with RunDir(tmp_path).metrics.open("a") as file:
        file.write('{"label": "b", "st')
    Recorder(RunDir(tmp_path), regression_config(), is_resumed=True).cut("b", 2, [0])
    lines = RunDir(tmp_path).metrics.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        *rows[:6], *(row for row in rows[6:] if row["step"] < 2 and row != rows[9])
    ]  # fmt: skip
