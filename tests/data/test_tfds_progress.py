"""The bars of TFDS become stages, and TFDS prints nothing."""

import sys

from tensorflow_datasets.core.utils import tqdm_utils

from jaxmaml import stages
from jaxmaml.data import tfds_progress


def test_a_bar_of_tfds_is_a_stage_and_prints_nothing(capfd):
    found = []
    with stages.listening(found.append), tfds_progress.as_stages():
        print("Downloading and preparing dataset ...")
        print("a warning", file=sys.stderr)
        for _ in tqdm_utils.tqdm(range(3), desc="Generating splits...", unit=" splits"):
            pass
        with tqdm_utils.async_tqdm(total=0, desc="Dl Size...", unit=" MiB") as bar:
            bar.update_total(7)
            bar.update(7)
    shown = [(stage.what, stage.done, stage.total) for stage in dict.fromkeys(found)]
    assert shown[0] == ("Generating splits (splits)", 3, 3)
    assert shown[-1] == ("Dl Size (MiB)", 7, 7)
    assert all(stage.is_over for stage in found)
    assert capfd.readouterr() == ("", "")


def test_the_bars_are_those_of_tfds_afterwards():
    before = tqdm_utils.tqdm_lib
    with tfds_progress.as_stages():
        assert tqdm_utils.tqdm_lib is not before
    assert tqdm_utils.tqdm_lib is before
