"""Class splits: the published lists are complete and disjoint, and files are read and written."""

import json

import numpy as np
import pytest

from jaxmaml.data import class_splits

SIZES = {
    "cifar_fs": (64, 16, 20),
    "cub": (100, 50, 50),
    "fc100": (60, 20, 20),
    "glyphs": (229, 83, 247),
    "mini_imagenet": (64, 16, 20),
    "omniglot_finn": (1100, 100, 423),
    "omniglot_vinyals": (1028, 172, 423),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_splits_are_complete_and_disjoint(name):
    class_split = class_splits.published(name)
    assert tuple(class_split) == ("train", "val", "test")
    assert tuple(len(names) for names in class_split.values()) == SIZES[name]
    everything = [name for names in class_split.values() for name in names]
    assert len(set(everything)) == len(everything)


def test_the_finn_split_is_the_draw_that_it_states():
    class_split = class_splits.published("omniglot_finn")
    names = sorted(name for names in class_split.values() for name in names)
    order = np.random.RandomState(1).permutation(names).tolist()
    assert len(names) == 1623
    assert class_split["train"] == sorted(order[:1100])
    assert class_split["val"] == sorted(order[1100:1200])
    assert class_split["test"] == sorted(order[1200:])


def test_both_omniglot_splits_name_the_same_characters():
    finn, vinyals = (class_splits.omniglot(name) for name in ("finn", "vinyals"))
    characters = [{name for names in s.values() for name in names} for s in (finn, vinyals)]
    assert characters[0] == characters[1]


def test_a_drawn_split_holds_every_class_once_and_depends_on_the_seed_only():
    names = [f"class {i}" for i in range(20)]
    drawn = class_splits.draw(names, (0.5, 0.25, 0.25), 3)
    assert [len(names) for names in drawn.values()] == [10, 5, 5]
    assert sorted(name for names in drawn.values() for name in names) == sorted(names)
    assert class_splits.draw(names[::-1], (0.5, 0.25, 0.25), 3) == drawn
    assert class_splits.draw(names, (0.5, 0.25, 0.25), 4) != drawn


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((0.5, 0.5), "three positive numbers"),
        ((0.5, 0.5, 0.5), "add up to 1"),
        ((1.0, 0.0, 0.0), "three positive numbers"),
        ((0.3, 0.3, float("nan")), "three positive numbers"),
        ((float("nan"), 0.5, 0.5), "three positive numbers"),
        ((0.98, 0.01, 0.01), "10 classes are too few for fractions"),
    ],
)
def test_draw_refuses_fractions_that_cannot_be(fractions, message):
    with pytest.raises(ValueError, match=message):
        class_splits.draw("abcdefghij", fractions, 0)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_draw_refuses_seeds_out_of_range(seed):
    message = f"seed must be between 0 and 4,294,967,295; got {seed}"
    with pytest.raises(ValueError, match=message):
        class_splits.draw("abcdefghij", seed=seed)


def test_a_written_file_is_read_back_and_never_overwritten(tmp_path):
    path = tmp_path / "split.json"
    class_split = class_splits.draw("abcdef", (0.5, 0.25, 0.25), 3)
    class_splits.write(path, class_split, seed=3)
    assert class_splits.read(path) == class_split
    assert json.loads(path.read_text())["seed"] == 3
    with pytest.raises(ValueError, match="a split is drawn once"):
        class_splits.write(path, {})
    assert class_splits.read(path) == class_split


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "split.json cannot be read: No such file"),
        ("{", "split.json is not JSON"),
        ("[]", "must have a list of class names for 'train'"),
        ('{"train": ["a"], "val": ["b"]}', "must have a list of class names for 'test'"),
        ('{"train": ["a"], "val": [], "test": ["c"]}', "for 'val'"),
        ('{"train": [1], "val": ["b"], "test": ["c"]}', "for 'train'"),
    ],
)
def test_read_refuses_a_wrong_file(content, message, tmp_path):
    path = tmp_path / "split.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        class_splits.read(path)


def test_val_and_test_get_as_many_classes_as_an_episode_needs():
    names = [f"class {i:02}" for i in range(40)]
    sizes = lambda number, smallest: [
        len(drawn)
        for drawn in class_splits.draw(names[:number], smallest=smallest).values()
    ]  # fmt: skip
    assert sizes(15, 5) == [5, 5, 5]
    assert sizes(16, 5) == [6, 5, 5]
    assert sizes(40, 5) == sizes(40, 0) == [26, 6, 8]
    with pytest.raises(ValueError, match=r"14 classes are too few .* at least 5 in each split"):
        class_splits.draw(names[:14], smallest=5)


def test_the_classes_of_a_run_are_a_split_file(tmp_path):
    path = tmp_path / "config.json"
    class_split = class_splits.draw("abcdef")
    path.write_text(json.dumps({"seed": 0, "class_split": class_split}))
    assert class_splits.read(path) == class_split
    path.write_text(json.dumps({"seed": 0, "class_split": None}))
    with pytest.raises(ValueError, match="must have a list of class names for 'train'"):
        class_splits.read(path)
