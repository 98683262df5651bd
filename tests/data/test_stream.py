"""Episodes from disk: those of the pool, from any step, with workers and without, whatever breaks."""

import gc
import io
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
from PIL import Image

from jaxmaml.data import images, pools, sources, stream
from jaxmaml.data.augment import Augment

KEY = jax.random.key(7)
EPISODE: dict[str, Any] = {"num_tasks": 4, "way": 3, "shot": 1, "query": 2}


def unequal(sizes=(5, 9, 4, 12, 7), side=6, channels=3):
    """Images of noise, of classes of unequal size."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    pixels = np.random.default_rng(0).integers(0, 256, (labels.size, side, side, channels))
    names = [f"class {i}" for i in range(len(sizes))]
    return images.from_arrays(pixels.astype(np.uint8), labels, names)


def folder_of_images(path, sizes=(5, 4, 6, 5), side=9):
    """A folder for each class, of PNG files."""
    rng = np.random.default_rng(1)
    for label, size in enumerate(sizes):
        (path / f"class{label}").mkdir(parents=True)
        for number in range(size):
            pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(path / f"class{label}" / f"{number}.png")
    return path


@pytest.fixture
def from_folder(tmp_path, monkeypatch):
    """(folder, function of nothing that opens its images), the cache being elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = folder_of_images(tmp_path / "folder")
    names = [f"class{i}" for i in range(4)]
    split = tmp_path / "split.json"
    # Validation and test are not looked at here.
    split.write_text(json.dumps({"train": names[:2], "val": names[2:3], "test": names[3:]}))

    def open_images(**options):
        return sources.images(f"folder:{folder}", None, str(split), 6, **options)["train"]

    return folder, open_images


def take(tasks, count):
    return [jax.tree.map(np.asarray, next(tasks)) for _ in range(count)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)


def of_pool(stored, first, count, **settings):
    sample = jax.jit(pools.sampler(pools.from_images(stored), **(EPISODE | settings)))
    return [sample(jax.random.fold_in(KEY, step)) for step in range(first, first + count)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rotate": True},
        {"augment": Augment(crop=2, flip=True, jitter=0.3, mean=(0.5,), std=(0.25,))},
    ],
    ids=["plain", "rotate", "augment"],
)
def test_a_stream_gives_what_a_pool_gives(settings):
    stored = unequal()
    with stream.sampler(stored, key=KEY, **EPISODE, **settings) as tasks:
        assert_same(take(tasks, 5), of_pool(stored, 0, 5, **settings))


@pytest.mark.parametrize("step", [0, 3, stream.STEPS_PER_BLOCK - 1, stream.STEPS_PER_BLOCK, 700])
def test_a_stream_goes_on_from_any_step(step):
    stored = unequal()
    with stream.sampler(stored, key=KEY, **EPISODE) as tasks:
        tasks.set_state({"step": step})
        assert_same(take(tasks, 4), of_pool(stored, step, 4))
        assert tasks.get_state() == {"step": step + 4}


def test_a_stream_crosses_blocks_of_plans():
    stored = unequal()
    with stream.sampler(stored, key=KEY, **EPISODE) as tasks:
        found = take(tasks, 3 * stream.STEPS_PER_BLOCK + 3)
    assert_same(found[-5:], of_pool(stored, len(found) - 5, 5))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(True, id="cached"),
        pytest.param(False, id="decoded", marks=pytest.mark.slow),
    ],
)
def test_restored_the_next_hundred_episodes_are_the_same(num_workers, cache, from_folder):
    stored = from_folder[1](cache=cache)
    settings: dict[str, Any] = EPISODE | {"way": 2, "num_workers": num_workers}
    with stream.sampler(stored, key=KEY, **settings) as tasks:
        take(tasks, 17)
        state = tasks.get_state()
        expected = take(tasks, 100)
    with stream.sampler(stored, key=KEY, **settings) as again:
        again.set_state(state)
        assert_same(take(again, 100), expected)
    assert_same(expected[:3], of_pool(stored, 17, 3, way=2))


def test_a_closed_or_forgotten_stream_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tasks = stream.sampler(unequal(), key=KEY, **EPISODE)
    next(tasks)
    assert list(tmp_path.iterdir())
    tasks.close()
    assert not list(tmp_path.iterdir())
    tasks = stream.sampler(unequal(), key=KEY, **EPISODE)
    del tasks
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("augment", [Augment(), Augment(crop=2, flip=True)], ids=["plain", "crop"])
def test_two_processes_read_what_one_reads(augment):
    stored = unequal()
    expected = of_pool(stored, 9, 3, augment=augment)
    shares = []
    for index in range(2):
        with stream.sampler(
            stored, key=KEY, **EPISODE, augment=augment, process_index=index, process_count=2
        ) as tasks:
            assert tasks.num_tasks == 2
            tasks.set_state({"step": 9})
            shares.append(take(tasks, 3))
    joined = [
        jax.tree.map(lambda a, b: np.concatenate([a, b]), *pair)
        for pair in zip(*shares, strict=True)
    ]
    assert_same(joined, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"way": 6}, "way=6 is more than the 5 classes"),
        ({"query": 4}, "the smallest class has: 'class 2' has 4 images"),
        ({"num_workers": -1}, "num_workers must not be negative, got -1"),
        ({"process_index": 2, "process_count": 2}, "process_index must be from 0"),
        ({"process_index": 0, "process_count": 3}, "num_tasks=4 must be divided by the 3"),
        ({"augment": Augment(crop=6)}, "crop must be from 0 to below"),
    ],
)
def test_a_stream_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        stream.sampler(unequal(), key=KEY, **(EPISODE | changed))


@pytest.mark.parametrize("state", [{}, {"step": -1}, {"step": 2.0}, {"step": 2**31}])
def test_a_state_that_is_none_is_refused(state):
    with (
        stream.sampler(unequal(), key=KEY, **EPISODE) as tasks,
        pytest.raises(ValueError, match="state must be"),
    ):
        tasks.set_state(state)


def test_an_image_that_cannot_be_decoded_is_named(from_folder):
    folder, open_images = from_folder
    (folder / "class1" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    with pytest.raises(ValueError, match=r"class1/2\.png: image cannot be decoded"):
        open_images(cache=True)
    stored = open_images(cache=False)
    with (
        stream.sampler(stored, key=KEY, num_tasks=4, way=2, shot=1, query=2) as tasks,
        pytest.raises(ValueError, match=r"class1/2\.png: image cannot be decoded"),
    ):
        take(tasks, 200)


def test_a_damaged_cache_of_images_is_built_again(from_folder, tmp_path):
    expected = from_folder[1]().read(np.arange(4))
    (cache,) = (tmp_path / "cache" / "jaxmaml" / "images").iterdir()
    for damage in (b"", cache.read_bytes()[:-1], b"no array"):
        cache.write_bytes(damage)
        np.testing.assert_array_equal(from_folder[1]().read(np.arange(4)), expected)


def test_a_changed_image_makes_another_cache(from_folder, tmp_path):
    folder, open_images = from_folder
    before = open_images().read(np.arange(5))
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "class0" / "0.png")
    after = open_images().read(np.arange(5))
    assert before[0].any()
    assert not after[0].any()
    np.testing.assert_array_equal(after[1:], before[1:])


def test_a_full_disk_leaves_nothing_behind(from_folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"images/.* cannot be written: .*No space left"):
        from_folder[1]()
    assert not list((tmp_path / "cache" / "jaxmaml" / "images").iterdir())


@pytest.mark.parametrize("target", ["cache", "folder"])
def test_a_directory_that_cannot_be_read_or_written_is_named(target, from_folder, tmp_path):
    if target == "cache":
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(ValueError, match="cannot be written"):
            from_folder[1]()
    else:
        stored = from_folder[1](cache=False)
        (from_folder[0] / "class0" / "0.png").unlink()
        with pytest.raises(ValueError, match=r"class0/0\.png cannot be read"):
            stored.read(np.arange(5))


PROGRAM = """
import sys, json, jax, numpy as np
from jaxmaml.data import sources, stream

if __name__ == "__main__":
    folder, split = sys.argv[1:3]
    stored = sources.images(f"folder:{folder}", None, split, 6, cache=len(sys.argv) > 3)["train"]
    settings = {"num_tasks": 4, "way": 2, "shot": 1, "query": 2, "num_workers": 2}
    tasks = stream.sampler(stored, key=jax.random.key(7), **settings)
    for step in range(10_000):
        next(tasks)
        if step == 5:
            import multiprocessing
            print(json.dumps([p.pid for p in multiprocessing.active_children()]), flush=True)
            sys.stdin.readline()
"""


def _program(tmp_path, from_folder, *arguments):
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(PROGRAM))
    command = [sys.executable, str(path), str(from_folder[0]), str(tmp_path / "split.json")]
    return subprocess.Popen(
        [*command, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_worker_that_is_killed_is_an_error_and_no_hang(tmp_path, from_folder):
    with _program(tmp_path, from_folder) as program:
        assert program.stdout is not None
        workers = json.loads(program.stdout.readline())
        assert workers
        os.kill(workers[0], signal.SIGKILL)
        _, errors = program.communicate("\n", timeout=60)
    assert program.returncode != 0
    assert "RuntimeError" in errors or "process" in errors


def test_two_processes_may_build_one_cache_at_once(tmp_path, from_folder):
    programs = [
        subprocess.Popen(
            [
                *(sys.executable, "-c"),
                "import sys; from jaxmaml.data import sources; "
                "print(sources.images(f'folder:{sys.argv[1]}', None, sys.argv[2], 6)"
                "['train'].read([0, 1]).sum())",
                *(str(from_folder[0]), str(tmp_path / "split.json")),
            ],
            stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    printed = {program.communicate(timeout=60)[0].strip() for program in programs}
    assert printed == {str(from_folder[1](cache=False).read([0, 1]).sum())}
    assert len(list((tmp_path / "cache" / "jaxmaml" / "images").iterdir())) == 1


@pytest.mark.parametrize("dataset", ["omniglot", "cifar-fs", "fc100"])
def test_prepared_sets_stream_what_their_pools_give(dataset, test_data):
    stored = sources.images(dataset, test_data, cache=False)["val"]
    settings: dict[str, Any] = {"rotate": dataset == "omniglot"}
    with stream.sampler(stored, key=KEY, **EPISODE, **settings) as tasks:
        assert_same(take(tasks, 2), of_pool(stored, 0, 2, **settings))


def test_png_bytes_decode_to_their_pixels():
    from jaxmaml.data.images import Decoder, Format

    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")

    class One:
        def encoded(self, numbers):
            return [file.getvalue() for _ in numbers]

    read = Decoder(One(), Format(6)).read(np.arange(2))  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(read, np.stack([pixels, pixels]))
