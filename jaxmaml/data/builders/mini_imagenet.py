"""`mini_imagenet`: a TFDS dataset made of a folder of images that the user supplies.

Importing this module registers the builder with TFDS. The folder holds one folder for each of the
hundred synsets (n01532829, ...). The TFDS splits are the class split of Ravi & Larochelle (2017).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxmaml.data import class_splits
from jaxmaml.data.folders import is_image

_SPLIT_OF = {"train": "train", "validation": "val", "test": "test"}  # by TFDS split


class MiniImagenet(tfds.core.GeneratorBasedBuilder):
    """miniImageNet: 64 / 16 / 20 classes of ImageNet, with 600 images each as published.

    Images keep the bytes and the size that they have in the folder. They are resized when read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     builder = MiniImagenet(data_dir=directory, file_format="array_record")
        ...     builder.info.features["label"].num_classes
        100
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "a folder with one folder of images for each of the 100 synsets of miniImageNet "
        "(n01532829, ...)"
    )

    def _info(self) -> tfds.core.DatasetInfo:
        class_split = class_splits.published("mini_imagenet")
        names = [name for names in class_split.values() for name in names]
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

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        folder = Path(dl_manager.manual_dir)
        class_split = class_splits.published("mini_imagenet")
        names = [name for names in class_split.values() for name in names]
        absent = [name for name in names if not (folder / name).is_dir()]
        if absent:
            raise ValueError(
                f"{folder} must hold one folder of images for each of the 100 synsets; "
                f"{len(absent)} are missing: {', '.join(absent[:5])}"
            )
        return {
            tfds_split: self._generate_examples(folder, class_split[split])
            for tfds_split, split in _SPLIT_OF.items()
        }

    def _generate_examples(
        self, folder: Path, names: list[str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in names:
            for file in sorted((folder / name).iterdir()):
                if is_image(file):
                    # Encoding an array would need TensorFlow, bytes do not.
                    yield f"{name}/{file.name}", {"image": file.read_bytes(), "label": name}
