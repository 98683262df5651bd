"""Fixtures of the tests of the experiments."""

import numpy as np
import pytest

from experiments.tiny import IMAGE_SHAPE, REGRESSION
from jaxmaml.data import pools
from jaxmaml.experiments import candidates, compare


@pytest.fixture(scope="session")
def images():
    """Images of five classes, the same ones in each split: each class has its own gray value."""
    labels = np.arange(40) % 5
    noise = np.random.default_rng(0).integers(0, 20, (40, *IMAGE_SHAPE))
    gray = (50 * labels)[:, None, None, None] + noise
    pool = pools.from_arrays(gray.astype(np.uint8), labels, list("abcde"))
    return {"train": pool, "val": pool, "test": pool}


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """(comparison, runs) of exact against first-order MAML on sinusoids."""
    comparison = compare.prepare(
        REGRESSION, candidates.comparison(REGRESSION), tmp_path_factory.mktemp("compare") / "run",
        num_test_tasks=5,
    )  # fmt: skip
    return comparison, compare.execute(comparison)
