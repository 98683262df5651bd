"""The peers of benchmarks/peers.py compute our meta-gradient."""

import importlib
import importlib.util
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed"
)

LIBRARIES = {
    "higher": "higher",
    "torchopt": "torchopt",
    "learn2learn": "learn2learn",
    "parallel-metalearn vmap": "metalearn",
    "parallel-metalearn loop": "metalearn",
}
"""The module that each peer of another library than PyTorch needs."""
PEERS = ("torch.autograd", "torch.func loop", "torch.func vmap", *LIBRARIES)
TOLERANCE = 1e-9
CASES = [
    *(("mlp", "first"), ("sinusoid", "exact")),
    *(
        pytest.param(case, marks=pytest.mark.slow)
        for case in (
            *(("conv-1q", "first"), ("conv-15q", "exact")),
            *(("conv-pooled", "exact"), ("torchbench", "exact")),
            *(("conv-1q", "exact"), ("mlp", "exact")),
        )
    ),
]


def _module(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers warn when they are imported
        return importlib.import_module(name)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    """(preset, model for PyTorch, our meta-gradient) at a tiny size, in float64."""
    name, order = request.param
    works, models = _module("peer_works"), _module("peer_models")
    preset = works.shrink(works.PRESETS[name])
    problem = works.build(preset, order)
    inputs, gradient = works.in_float64(problem)
    return preset, models.convert(preset, order, *inputs), gradient


@pytest.mark.parametrize("peer", PEERS)
def test_peer_gives_our_meta_gradient(case, peer):
    preset, model, expected = case
    if peer in LIBRARIES and importlib.util.find_spec(LIBRARIES[peer]) is None:
        pytest.skip(f"{peer} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _module("peer_torch").PEERS[peer](model)
        made.run()
    gradient = {name: leaf.grad for name, leaf in made.params.items()}
    assert _module("peer_models").relative_error(gradient, expected, preset) < TOLERANCE


def test_a_wrong_gradient_is_noticed(case):
    preset, model, expected = case
    wrong = {name: leaf * 0 for name, leaf in model.params.items()}
    assert _module("peer_models").relative_error(wrong, expected, preset) == pytest.approx(1)


@pytest.mark.parametrize("work", ["conv-1q", "conv-pooled", "torchbench", "mlp"])
def test_parameters_of_a_peer_are_read_back(work):
    works, models = _module("peer_works"), _module("peer_models")
    preset = works.shrink(works.PRESETS[work])
    problem = works.build(preset, "exact")
    tensors = models.convert(preset, "exact", problem.params, problem.tasks).params
    restored = models.restore(tensors, problem.params, preset)
    jax.tree.map(np.testing.assert_array_equal, restored, problem.params)
