"""The sources of a preset: the same tasks whatever feeds them, random changes in training only."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from data.image_sets import write_folder

from experiments.tiny import IMAGE_SHAPE, PRESET, REGRESSION
from jaxmaml.data import pools
from jaxmaml.experiments import presets
from jaxmaml.experiments.tasks import (
    MAX_TASKS_DRAWN,
    Streaming,
    class_split_of,
    fixed_tasks,
    input_shape,
    located,
    make_sources,
    num_classes,
)
from jaxmaml.sources import batches

KEY = jax.random.key(0)


def _num_tasks(tasks):
    return len(jax.tree.leaves(tasks)[0])


def test_each_split_has_its_own_sizes(images):
    preset = presets.override(PRESET, num_tasks=4, query=2, test_query=3, num_val_tasks=7)
    sources = make_sources(preset, num_test_tasks=5, images=images)
    assert list(sources) == ["train", "val", "test"]
    shapes = {
        split: jax.eval_shape(source, KEY).query["targets"].shape
        for split, source in sources.items()
    }
    # Validation and test draw the same number of tasks, so that one program scores both.
    assert shapes == {"train": (4, 6), "val": (7, 9), "test": (7, 9)}
    assert input_shape(sources["train"]) == IMAGE_SHAPE
    assert num_classes(sources["train"]) == 5


def test_the_classes_of_each_split_are_named(images):
    named = class_split_of(make_sources(PRESET, num_test_tasks=5, images=images))
    assert named == {split: list("abcde") for split in ("train", "val", "test")}
    assert class_split_of(make_sources(REGRESSION, num_test_tasks=5)) is None


@pytest.mark.parametrize(
    ("changes", "data_dir", "expected"),
    [
        ({"dataset": "folder:a", "split": "s"}, None, ("folder:CWD/a", "CWD/s", None)),
        ({"dataset": "folder:~/a", "split": "~/s"}, None, ("folder:HOME/a", "HOME/s", None)),
        ({"dataset": "tfds:a", "split": "s"}, None, ("tfds:a", "CWD/s", "CWD/env")),
        ({"dataset": "omniglot", "split": "finn"}, None, ("omniglot", "finn", "CWD/env")),
        ({"dataset": "omniglot", "split": "s.json"}, "d", ("omniglot", "CWD/s.json", "CWD/d")),
        ({"dataset": "omniglot", "split": ""}, "d", ("omniglot", "", "CWD/d")),
        ({"dataset": "glyphs"}, "~/d", ("glyphs", "script", "HOME/d")),
        ({"dataset": "glyphs"}, None, ("glyphs", "script", None)),
    ],
)
def test_paths_mean_the_same_in_another_directory(changes, data_dir, expected, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "env")
    preset = presets.override(PRESET, **changes)
    preset, found = located(preset, None if data_dir is None else Path(data_dir))
    written = (preset.dataset, preset.split, None if found is None else str(found))
    home, here = str(Path.home()), str(Path.cwd())
    full = [x and x.replace("CWD", here).replace("HOME", home) for x in expected]
    assert list(written) == full


def test_each_split_draws_from_its_own_images(images):
    blank = pools.from_arrays(np.zeros((40, *IMAGE_SHAPE), np.uint8), np.arange(40) % 5, "abcde")
    sources = make_sources(PRESET, num_test_tasks=5, images={**images, "test": blank})
    drawn = {split: next(batches(source, KEY)) for split, source in sources.items()}
    assert not np.any(drawn["test"].support["inputs"])
    assert np.any(drawn["val"].support["inputs"])


def test_few_tasks_are_drawn_at_a_time():
    sources = make_sources(REGRESSION, num_test_tasks=250)
    drawn = [_num_tasks(tasks) for tasks in fixed_tasks(sources["test"], KEY, 250)]
    assert drawn == [MAX_TASKS_DRAWN] * 3


def test_fixed_tasks_depend_on_the_key_only():
    source = make_sources(REGRESSION, num_test_tasks=3)["test"]
    (first,), (again,) = (list(fixed_tasks(source, KEY, 3)) for _ in range(2))
    np.testing.assert_array_equal(first.query["inputs"], again.query["inputs"])
    (other,) = fixed_tasks(source, jax.random.key(1), 3)
    assert not np.allclose(other.query["inputs"], first.query["inputs"])


def test_tasks_depend_on_the_key_and_the_step_only():
    source = make_sources(REGRESSION, num_test_tasks=3)["train"]
    several = list(itertools.islice(batches(source, KEY), 4))
    resumed = next(batches(source, KEY, 3))
    np.testing.assert_array_equal(several[3].query["inputs"], resumed.query["inputs"])
    assert not np.allclose(several[0].query["inputs"], resumed.query["inputs"])


def test_images_are_changed_in_training_only(images):
    preset = presets.override(PRESET, jitter=1.0)
    plain = make_sources(PRESET, num_test_tasks=2, images=images)
    changed = make_sources(preset, num_test_tasks=2, images=images)
    for split, is_same in (("train", False), ("val", True), ("test", True)):
        pair = [next(batches(sources[split], KEY)) for sources in (plain, changed)]
        pixels = [np.asarray(tasks.support["inputs"]) for tasks in pair]
        assert np.array_equal(pixels[0], pixels[1]) == is_same


def test_class_numbers_are_given_in_training_only(images):
    """Pixels tell the class of an example: each class of these images has its own gray value."""
    sources = make_sources(PRESET, num_test_tasks=2, images=images, with_classes=True)
    for batch in next(batches(sources["train"], KEY)):
        gray = np.asarray(batch["inputs"]).mean((-1, -2, -3)) * 255
        np.testing.assert_array_equal(batch["classes"], (gray // 50).astype(int))
    assert "classes" not in next(batches(sources["test"], KEY)).support


def test_a_stream_gives_the_tasks_of_a_pool(small_datasets):
    pool = make_sources(PRESET, num_test_tasks=2, with_classes=True)
    stream = make_sources(PRESET, num_test_tasks=2, with_classes=True, streaming=Streaming())
    assert input_shape(stream["train"]) == input_shape(pool["train"])
    assert num_classes(stream["train"]) == num_classes(pool["train"]) == 5
    for first_step in (0, 3):
        pair = [next(batches(sources["train"], KEY, first_step)) for sources in (pool, stream)]
        for name in ("targets", "classes"):
            np.testing.assert_array_equal(pair[0].support[name], pair[1].support[name])
        numbers = pair[0].support["classes"]
        assert 0 <= numbers.min() <= numbers.max() < num_classes(pool["train"])
        np.testing.assert_allclose(pair[0].support["inputs"], pair[1].support["inputs"], atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        (PRESET, {"num_test_tasks": 0}, "num_test_tasks must be an integer, 1 or more; got 0"),
        (REGRESSION, {"streaming": Streaming()}, "sinusoid has no images to stream"),
        (presets.override(PRESET, crop=28), {}, "crop must be"),
    ],
)
def test_sources_that_cannot_be_are_refused(preset, options, message, small_datasets):
    with pytest.raises(ValueError, match=message):
        make_sources(preset, **{"num_test_tasks": 2, **options})


def _pictures(path, **changes):
    preset = presets.get("pictures-5w1s")
    return presets.override(preset, dataset=f"folder:{path}", image_size=4, **changes)


def test_a_folder_without_a_split_file_is_divided_in_the_same_way_each_time(tmp_path):
    write_folder(tmp_path, sizes=(4,) * 7, side=4)
    preset = _pictures(tmp_path, way=2)
    drawn = class_split_of(make_sources(preset, num_test_tasks=5))
    assert drawn is not None
    assert {split: len(names) for split, names in drawn.items()} == {
        "train": 3,
        "val": 2,
        "test": 2,
    }
    assert sorted(name for names in drawn.values() for name in names) == [
        f"class{i}" for i in range(7)
    ]
    assert class_split_of(make_sources(preset, num_test_tasks=5)) == drawn
    # A split that is given is used.
    other = {
        "train": ["class0", "class1"],
        "val": ["class2", "class3"],
        "test": ["class4", "class5"],
    }
    assert class_split_of(make_sources(preset, num_test_tasks=5, class_split=other)) == other


def test_a_folder_with_too_few_classes_is_refused(tmp_path):
    write_folder(tmp_path, sizes=(4,) * 14, side=4)
    with pytest.raises(ValueError, match=r"has 14 classes, and way=5 needs 15.*way to at most 4"):
        make_sources(_pictures(tmp_path), num_test_tasks=5)
    assert make_sources(_pictures(tmp_path, way=4), num_test_tasks=5)


def test_only_ways_that_are_accepted_are_advised(tmp_path):
    write_folder(tmp_path, sizes=(4,) * 5, side=4)
    message = r"has 5 classes, and way=5 needs 15, .* test: add classes, at least 1 for way=2$"
    with pytest.raises(ValueError, match=message):
        make_sources(_pictures(tmp_path), num_test_tasks=5)


def test_pictures_need_a_folder():
    with pytest.raises(ValueError, match=r"'folder:' names nothing: write folder:PATH"):
        make_sources(presets.get("pictures-5w1s"), num_test_tasks=5)
