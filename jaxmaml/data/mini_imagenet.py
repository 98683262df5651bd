"""`mini_imagenet`: a TFDS data set over a folder of images that the user supplies.

Importing this module registers the builder with TFDS. The folder holds a folder for each of the
hundred synsets, n01532829 and so on; the classes of Ravi & Larochelle (2017) make the splits.
"""

from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from jaxmaml.data.classes import class_list
from jaxmaml.data.records import IMAGE_SUFFIXES

_SPLITS = {"train": "train", "validation": "val", "test": "test"}


class MiniImagenet(tfds.core.GeneratorBasedBuilder):
    """miniImageNet: 64 / 16 / 20 classes of ImageNet, 600 images each as published.

    Images keep the bytes and size that they have in the folder; they are resized when read.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "a folder of images for each synset of miniImageNet (n01532829, ...), 100 in all"
    )

    def _info(self) -> tfds.core.DatasetInfo:
        names = [name for listed in class_list("mini_imagenet").values() for name in listed]
        return self.dataset_info_from_configs(
            description="miniImageNet with the split of Ravi & Larochelle (2017).",
            homepage="https://openreview.net/forum?id=rJY0-Kcll",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=sorted(names)),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = Path(dl_manager.manual_dir)
        listed = class_list("mini_imagenet")
        absent = [name for part in listed.values() for name in part if not (folder / name).is_dir()]
        if absent:
            raise ValueError(
                f"{folder} must hold a folder of images for each of the 100 synsets; "
                f"{len(absent)} are missing: {', '.join(absent[:5])}"
            )
        return {
            split: self._generate_examples(folder, listed[part]) for split, part in _SPLITS.items()
        }

    def _generate_examples(self, folder: Path, names: list[str]) -> Iterator[tuple[str, dict]]:
        for name in names:
            for file in sorted((folder / name).iterdir()):
                if file.suffix.lower() in IMAGE_SUFFIXES:
                    # Bytes: encoding an array would need TensorFlow.
                    yield f"{name}/{file.name}", {"image": file.read_bytes(), "label": name}
