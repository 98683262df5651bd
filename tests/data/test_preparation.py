"""Preparation: what is there is left alone, and what is missing is named at once."""

import socket
import threading
import time

import pytest

from jaxmaml.data import preparation


def test_the_listing(prepared):
    (found,) = preparation.listing(prepared)
    assert found.name == "mini_imagenet"
    assert found.directory == prepared / "mini_imagenet" / "1.0.0"
    assert (found.num_classes, found.num_images) == (100, 400)
    assert found.smallest[1] == 4
    assert not found.problem


def test_the_listing_tells_what_is_wrong(copied):
    (shard,) = (copied / "mini_imagenet" / "1.0.0").glob("*-train.array_record*")
    shard.write_bytes(b"damaged")
    (found,) = preparation.listing(copied)
    assert "cannot be read" in found.problem
    assert found.num_images == 0


def test_preparing_again_does_nothing(prepared):
    directory = prepared / "mini_imagenet" / "1.0.0"
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert preparation.prepare("mini-imagenet", prepared) == directory
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_an_absent_or_incomplete_archive_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs --archive-dir: a folder with one folder of images"):
        preparation.prepare("mini-imagenet", tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        preparation.prepare("mini-imagenet", tmp_path, tmp_path / "nowhere")
    (tmp_path / "n01532829").mkdir()
    with pytest.raises(ValueError, match="99 are missing"):
        preparation.prepare("mini-imagenet", tmp_path, tmp_path)
    assert not list(tmp_path.glob("mini_imagenet/1.0.0"))


def test_without_a_network_preparing_fails_soon(monkeypatch):
    def unreachable(*_, **__):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"must be downloaded from example\.org, which cannot"):
        preparation._check_network("example.org", "omniglot")
    assert time.perf_counter() - start < 10


def test_a_network_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: threading.Event().wait())
    monkeypatch.setattr(preparation, "CONNECT_SECONDS", -2.9)
    with pytest.raises(ValueError, match="no answer"):
        preparation._check_network("example.org", "omniglot")


def test_preparing_stock_data_needs_tensorflow(monkeypatch, tmp_path):
    monkeypatch.setattr(preparation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs TensorFlow: pip install 'jaxmaml\[prepare\]'"):
        preparation.prepare("omniglot", tmp_path)
