"""Stages are told to whoever listens, and to nobody else."""

import threading

import numpy as np
import pytest

from jaxmaml import stages
from jaxmaml.data import decoders, image_cache, pools, stored_images


@pytest.fixture
def heard():
    """(what, done, total, is_over) of every call of a listener."""
    calls = []
    listener = lambda stage: calls.append((stage.what, stage.done, stage.total, stage.is_over))
    with stages.listening(listener):
        yield calls


def test_a_stage_is_over_also_after_an_error(heard):
    def fail():
        with stages.stage("working", 3) as advance:
            advance(2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert heard == [("working", 0, 3, False), ("working", 2, 3, False), ("working", 2, 3, True)]


def test_no_more_is_done_than_there_is(heard):
    with stages.stage("working", 3) as advance:
        advance(5)
    assert heard[-1] == ("working", 3, 3, True)


def test_nobody_listens_outside_the_block_or_in_another_thread(heard):
    thread = threading.Thread(target=lambda: stages.stage("elsewhere").__enter__())
    thread.start()
    thread.join()
    assert not heard


def _images(count):
    return stored_images.from_arrays(
        np.zeros((count, 2, 2, 1), np.uint8), np.arange(count) % 2, ["a", "b"]
    )


def test_reading_images_is_a_stage(heard, monkeypatch):
    monkeypatch.setattr(decoders, "IMAGES_PER_CHUNK", 2)
    assert pools.from_images(_images(5)).images.shape == (5, 2, 2, 1)
    assert [done for _, done, _, _ in heard] == [0, 2, 4, 5, 5]
    assert heard[0] == ("decoding images", 0, 5, False)


def test_filling_the_image_cache_is_a_stage(heard, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "IMAGES_PER_CHUNK", 4)
    image_cache.Cache(tmp_path / "images.npy", 5, (2, 2, 1)).build(_images(5).reader)
    assert heard[-1] == ("decoding images, once", 5, 5, True)


def test_nothing_is_printed(capfd):
    pools.from_images(_images(5))
    assert capfd.readouterr() == ("", "")
