"""Streams: the tasks of a pool, from any step, with workers and without; every kind of failure."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from typing import Any

import jax
import numpy as np
import pytest
from image_sets import noise

from jaxmaml import files
from jaxmaml.data import datasets, pools, stream
from jaxmaml.data.augmentation import Augment

KEY = jax.random.key(7)
EPISODE: dict[str, Any] = {"num_tasks": 4, "way": 3, "shot": 1, "query": 2}


def take(tasks, count):
    return [jax.tree.map(np.asarray, next(tasks)) for _ in range(count)]


def streamed(images, first, count, **settings):
    """Returns the tasks of `count` steps of a stream."""
    with stream.sampler(images, **(EPISODE | settings)).start(KEY, first) as tasks:
        return take(tasks, count)


def pooled(images, first, count, **settings):
    """Returns the tasks that a pool of the same images gives for the same key and steps."""
    sample = jax.jit(pools.sampler(pools.from_images(images), **(EPISODE | settings)))
    return [sample(jax.random.fold_in(KEY, step)) for step in range(first, first + count)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rotate": True, "classes": True},
        {"augment": Augment(crop=2, flip=True, jitter=0.3, mean=(0.5,), std=(0.25,))},
    ],
    ids=["plain", "rotate", "augment"],
)
def test_a_stream_gives_what_a_pool_gives(settings):
    assert_same(streamed(noise(), 0, 5, **settings), pooled(noise(), 0, 5, **settings))


@pytest.mark.parametrize("step", [0, 3, stream.STEPS_PER_BLOCK - 1, stream.STEPS_PER_BLOCK, 700])
def test_a_stream_goes_on_from_any_step(step):
    expected = pooled(noise(), step, 4)
    source = stream.sampler(noise(), **EPISODE)
    with source.start(KEY, step) as tasks:
        assert_same(take(tasks, 4), expected)
        assert tasks.get_state() == {"step": step + 4}
    with source.start(KEY) as tasks:
        tasks.set_state({"step": step})
        assert_same(take(tasks, 4), expected)


def test_a_stream_crosses_blocks_of_plans():
    count = 3 * stream.STEPS_PER_BLOCK + 3
    found = streamed(noise(), 0, count)
    assert_same(found[-5:], pooled(noise(), count - 5, 5))


def test_a_source_is_a_value_that_can_be_started_again_and_by_another_key():
    source = stream.sampler(noise(), **EPISODE)
    assert source.input_shape == (6, 6, 3)
    with (
        source.start(KEY) as one,
        source.start(KEY) as same,
        source.start(jax.random.key(8)) as other,
    ):
        first = take(one, 2)
        assert_same(take(same, 2), first)
        assert (take(other, 1)[0].query["inputs"] != first[0].query["inputs"]).any()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(True, id="cached"),
        pytest.param(False, id="decoded", marks=pytest.mark.slow),
    ],
)
def test_restored_the_next_hundred_episodes_are_the_same(num_workers, cache, folder):
    images = folder.open(cache=cache)
    source = stream.sampler(images, **(EPISODE | {"way": 2, "num_workers": num_workers}))
    with source.start(KEY) as tasks:
        take(tasks, 17)
        state = tasks.get_state()
        expected = take(tasks, 100)
    with source.start(KEY) as again:
        again.set_state(state)
        assert_same(take(again, 100), expected)
    assert_same(expected[:3], pooled(images, 17, 3, way=2))


def test_a_closed_or_forgotten_stream_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = stream.sampler(noise(), **EPISODE)
    assert not list(tmp_path.iterdir())
    tasks = source.start(KEY)
    next(tasks)
    assert list(tmp_path.iterdir())
    tasks.close()
    assert not list(tmp_path.iterdir())
    tasks = source.start(KEY)
    del tasks
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_closed_stream_gives_no_more_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tasks = stream.sampler(noise(), **EPISODE).start(KEY)
    next(tasks)
    tasks.close()
    assert not list(tasks)
    with pytest.raises(ValueError, match="the stream is closed"):
        tasks.set_state({"step": 0})
    tasks.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("augment", [Augment(), Augment(crop=2, flip=True)], ids=["plain", "crop"])
def test_two_shares_read_what_one_reads(augment):
    shares = []
    for index in range(2):
        source = stream.sampler(noise(), **EPISODE, augment=augment, share=(index, 2))
        with source.start(KEY, 9) as tasks:
            assert tasks.num_tasks == 2
            shares.append(take(tasks, 3))
    joined = [
        jax.tree.map(lambda a, b: np.concatenate([a, b]), *pair)
        for pair in zip(*shares, strict=True)
    ]
    assert_same(joined, pooled(noise(), 9, 3, augment=augment))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"way": 6}, ValueError, "way=6 is more than the 5 classes"),
        ({"query": 4}, ValueError, "the smallest class has: 'class 2' has 4 images"),
        ({"shot": 1.5}, TypeError, "shot must be an integer, 1 or more; got 1.5"),
        ({"num_workers": -1}, ValueError, "num_workers must be an integer, 0 or more; got -1"),
        ({"share": (2, 2)}, ValueError, "share must be .* 0 <= index < count; got .2, 2"),
        ({"augment": Augment(crop=6)}, ValueError, "crop must be from 0 to 5"),
    ],
)
def test_a_stream_refuses(changed, error, message):
    with pytest.raises(error, match=message):
        stream.sampler(noise(), **(EPISODE | changed))


@pytest.mark.parametrize(
    ("step", "error"),
    [(None, TypeError), (-1, ValueError), (2.0, TypeError), (2**31, ValueError)],
)
def test_a_step_that_cannot_be_is_refused(step, error, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = stream.sampler(noise(), **EPISODE)
    with pytest.raises(error, match="step must be"):
        source.start(KEY, step)
    assert not list(tmp_path.iterdir())
    with source.start(KEY) as tasks, pytest.raises(error, match="step must be"):
        tasks.set_state({"step": step})
    with source.start(KEY) as tasks, pytest.raises(TypeError, match="step must be"):
        tasks.set_state({})


def test_an_image_that_cannot_be_decoded_is_named(folder):
    (folder.path / "class1" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n not an image")
    images = folder.open(cache=False)
    with pytest.raises(files.ReadError, match=r"class1/2\.png: image cannot be decoded"):
        streamed(images, 0, 200, way=2)


PROGRAM = """
import sys, json, jax, numpy as np
from jaxmaml.data import datasets, stream

if __name__ == "__main__":
    folder, split = sys.argv[1:3]
    images = datasets.images(f"folder:{folder}", None, split, 6, cache=False)["train"]
    source = stream.sampler(images, num_tasks=4, way=2, shot=1, query=2, num_workers=2)
    tasks = source.start(jax.random.key(7))
    for step in range(10_000):
        next(tasks)
        if step == 5:
            import multiprocessing
            print(json.dumps([p.pid for p in multiprocessing.active_children()]), flush=True)
            sys.stdin.readline()
"""


def test_a_killed_worker_is_an_error_and_does_not_hang(tmp_path, folder):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    with subprocess.Popen(
        [sys.executable, str(path), str(folder.path), str(folder.split)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as program:  # fmt: skip
        assert program.stdout is not None
        workers = json.loads(program.stdout.readline())
        assert workers
        os.kill(workers[0], signal.SIGKILL)
        _, errors = program.communicate("\n", timeout=60)
    assert program.returncode != 0
    assert "RuntimeError: Worker process was terminated unexpectedly" in errors


@pytest.mark.parametrize(
    "dataset", ["omniglot", "cifar-fs", pytest.param("fc100", marks=pytest.mark.slow)]
)
def test_prepared_sets_stream_what_their_pools_give(dataset, test_data):
    images = datasets.images(dataset, test_data, cache=False)["val"]
    settings: dict[str, Any] = {"rotate": dataset == "omniglot"}
    assert_same(streamed(images, 0, 2, **settings), pooled(images, 0, 2, **settings))


class _FailsOnce:
    """A reader that raises an error once, when it has read `number` times."""

    def __init__(self, reader, number):
        self.reader, self.shape, self.left = reader, reader.shape, number

    def read(self, numbers):
        self.left -= 1
        if self.left == 0:
            raise OSError("the disk is busy")
        return self.reader.read(numbers)


def test_a_stream_goes_on_after_an_error_that_was_caught():
    images = noise()
    expected = streamed(images, 0, 8)
    failing = dataclasses.replace(images, reader=_FailsOnce(images.reader, 4))
    with stream.sampler(failing, **EPISODE).start(KEY) as tasks:
        found = []
        while len(found) < 8:
            try:
                found += take(tasks, 1)
            except OSError:
                assert tasks.get_state() == {"step": len(found)}
        assert tasks.get_state() == {"step": 8}
    assert_same(found, expected)


@pytest.mark.parametrize("num_workers", [0, 4, 11, 64])
def test_the_plans_of_all_that_workers_read_ahead_are_written(num_workers):
    """Nothing is read here: a worker and its queues are six steps ahead."""
    tasks = stream.sampler(noise(), **EPISODE, num_workers=num_workers).start(KEY)
    for step in (0, 63, 64, 200):
        tasks.set_state({"step": step})
        tasks._plan_ahead()
        last = step + 6 * num_workers + 1
        blocks = range(step // stream.STEPS_PER_BLOCK, last // stream.STEPS_PER_BLOCK + 1)
        for block in blocks:
            assert stream._plan_file(tasks._directory, "examples", block).exists()
    tasks.close()


def test_the_last_step_of_a_key_is_read():
    first = stream.MAX_STEPS - 3
    with stream.sampler(noise(), **EPISODE).start(KEY, first) as tasks:
        assert len(list(tasks)) == 3
