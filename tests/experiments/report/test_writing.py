"""The folder of a report: what it holds, what it shows, and what is refused."""

import json
import os
import pathlib
import re
import shutil
from html.parser import HTMLParser

import pytest

from jaxmaml.experiments.report import writing
from jaxmaml.files import WriteError

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that elements are closed, and collects attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f"{data} "


def _write(tmp_path, *paths):
    page = writing.write(paths, tmp_path / "out")
    return Page(page.read_text()), page.parent


def test_the_page_shows_the_scores_and_needs_no_other_file(finished, tmp_path):
    page, folder = _write(tmp_path, finished)
    results = json.loads((finished / "results.json").read_text())
    for run in results["runs"].values():
        for mean, ci95 in zip(run["mse_per_step"], run["ci95_per_step"], strict=True):
            assert f"{mean:.3f} ± {ci95:.3f}" in page.text
            assert f"{mean:.3f} ± {ci95:.3f}" in (folder / "report.md").read_text()
            assert rf"${mean:.3f} \pm {ci95:.3f}$" in (folder / "table.tex").read_text()
    links = [a[name] for _, a in page.elements for name in ("src", "href") if name in a]
    assert links
    assert all(link.startswith(("data:image/png;base64,", "#part-")) for link in links)
    assert not re.search(r"url\(|@import|<script", (folder / "report.html").read_text())
    assert "Unfinished" not in page.text
    assert "finished: outer step 6 of 6" in page.text


def test_the_page_is_semantic(finished, tmp_path):
    page, _ = _write(tmp_path, finished)
    images = [a for tag, a in page.elements if tag == "img"]
    assert images
    assert all(len(a["alt"]) > 20 for a in images)
    assert {a["scope"] for tag, a in page.elements if tag == "th"} == {"row", "col"}
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == 1
    assert tags.count("table") == tags.count("caption")
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(set(ids)) == len(ids)


def test_the_markdown_has_its_pictures_beside_it(finished, tmp_path):
    _, folder = _write(tmp_path, finished)
    named = re.findall(r"^!\[.*\]\((.*)\)$", (folder / "report.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in folder.glob("*.png"))
    assert {"scores.png", "validation.png", "training.png", "regression.png"} <= set(named)


def test_an_unfinished_run_is_reported_as_such(unfinished, tmp_path):
    page, folder = _write(tmp_path, unfinished)
    assert "exact (unfinished: outer step 3 of 6)" in page.text
    assert "first (unfinished: outer step 0 of 6)" in page.text
    assert "Unfinished runs: last validation MSE" in page.text
    assert (folder / "training.png").exists()
    assert "begin{tabular}" not in page.text


def test_runs_of_several_directories_are_told_apart(finished, unfinished, tmp_path):
    page, _ = _write(tmp_path, unfinished, finished)
    for name in ("finished/exact", "finished/first", "unfinished/exact"):
        assert name in page.text


def test_only_what_differs_is_listed(finished, tmp_path):
    page, _ = _write(tmp_path, finished)
    (_, after) = page.text.split("Settings that are not the same in all runs")
    rows = after.partition("LaTeX")[0].split()
    assert rows == ["setting", "exact", "first", "order", "exact", "first"]


def test_names_are_escaped(finished, tmp_path):
    path = tmp_path / "<img src=x onerror=alert(1)> & | `*_"
    finished.rename(path)
    page, folder = _write(tmp_path, path)
    assert str(path) in page.text
    assert all(a["src"].startswith("data:") for tag, a in page.elements if tag == "img")
    assert "<img" not in (folder / "report.md").read_text()


@pytest.mark.parametrize("name", [r"a$\frac$b", "_hidden", "not-\udcff-utf8", "a`b```c|d"])
def test_any_name_of_a_directory_can_be_shown(finished, unfinished, tmp_path, name):
    path = tmp_path / name
    finished.rename(path)
    page, folder = _write(tmp_path, path, unfinished)
    assert f"{name}/exact".replace("\udcff", "?") in page.text
    assert (folder / "scores.png").exists()


def test_a_report_is_written_again_and_other_files_stay(finished, tmp_path):
    page = writing.write([finished])
    assert page == finished / "report" / "report.html"
    (page.parent / "notes.txt").write_text("mine")
    page.write_text("old")
    writing.write([finished])
    assert page.read_text() != "old"
    assert (page.parent / "notes.txt").read_text() == "mine"


def _break(name, text):
    return lambda path: (path / name).write_text(text)


def _append(text):
    def change(path):
        with (path / "metrics.jsonl").open("a") as file:
            file.write(text)

    return change


def _drop_a_run(path):
    results = json.loads((path / "results.json").read_text())
    del results["runs"]["first"]
    (path / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: shutil.rmtree(path), "holds no run"),
        (lambda path: (path / "config.json").unlink(), "holds no run"),
        (_break("config.json", "{"), "is not JSON"),
        (_break("config.json", "{}"), "is not as it was written"),
        (_break("results.json", '{"runs": '), r"results\.json is damaged"),
        (_break("results.json", "[]"), r"results\.json is damaged"),
        (_drop_a_run, r"is damaged \(KeyError: 'first'\)"),
        (lambda path: (path / "metrics.jsonl").unlink(), r"metrics\.jsonl is damaged"),
        (_append('{"label": "exact"'), r"metrics\.jsonl is damaged \(line \d+"),
        (_append("\0\0\0"), r"metrics\.jsonl is damaged \(line \d+"),
        (_append('{"label": "exact", "step": 9, "loss": 1.0}\n'), "is damaged"),
    ],
)
def test_a_damaged_directory_is_refused_and_nothing_is_written(finished, tmp_path, change, message):
    change(finished)
    with pytest.raises(ValueError, match=message) as error:
        writing.write([finished], tmp_path / "new" / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_directory_that_is_named_twice_is_refused(finished, tmp_path):
    again = pathlib.Path(f"{finished}/../{finished.name}")
    with pytest.raises(ValueError, match="is named twice"):
        writing.write([finished, again], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no RUN_DIR is given"):
        writing.write([], tmp_path / "out")


def test_a_folder_with_other_files_is_refused(finished, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files than a report"):
        writing.write([finished], tmp_path / "out")
    with pytest.raises(ValueError, match="is a file"):
        writing.write([finished], tmp_path / "out" / "mine.txt")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_full_disk_leaves_the_earlier_report(finished, tmp_path, monkeypatch):
    page = writing.write([finished], tmp_path / "out")
    before = page.read_bytes()
    write_bytes = pathlib.Path.write_bytes

    def fail(self, data):
        if self.name == "report.md":
            raise OSError(28, "No space left on device")
        return write_bytes(self, data)

    monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
    for out in ("out", "new/other"):
        with pytest.raises(WriteError, match=r"cannot be written: .*No space left"):
            writing.write([finished], tmp_path / out)
    assert page.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finished", "out"]


def test_a_report_that_was_interrupted_blocks_no_other(finished, tmp_path, monkeypatch):
    original, left = os.replace, [1]

    def killed(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        original(*args)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path, finished)
    monkeypatch.undo()
    _, folder = _write(tmp_path, finished)
    assert (folder / "table.tex").is_file()
