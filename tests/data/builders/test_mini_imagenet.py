"""miniImageNet, prepared from a folder of tiny images."""

import numpy as np
from PIL import Image

from jaxmaml.data import class_splits, datasets


def test_mini_imagenet_has_the_published_classes_and_every_image(prepared, synsets):
    opened = datasets.images("mini-imagenet", prepared, image_size=6, cache=False)
    names = {split: list(found.names) for split, found in opened.items()}
    assert names == class_splits.published("mini_imagenet")
    for found in opened.values():
        assert (found.sizes == 4).all()
        assert found.shape == (6, 6, 3)
    train = opened["train"]
    first = Image.open(synsets / train.names[0] / "0.png").resize((6, 6), Image.Resampling.BILINEAR)
    rows = train.read(np.arange(4))
    assert (rows == np.asarray(first)).all((1, 2, 3)).any()


def test_the_tfds_splits_are_the_class_split(prepared):
    from jaxmaml.data.records import TFDSRecords

    class_split = class_splits.published("mini_imagenet")
    for tfds_split, split in (("train", "train"), ("validation", "val"), ("test", "test")):
        records = TFDSRecords("mini_imagenet", prepared, (tfds_split,))
        present = {records.class_names[label] for label in records.labels()}
        assert present == set(class_split[split])
