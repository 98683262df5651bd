"""An exported model runs where this package cannot be imported, for any number of inputs."""

import json
import subprocess
import sys

import jax.export
import numpy as np
import pytest

from experiments.test_trained import PIXELS, SUPPORT, trained_run
from experiments.tiny import REGRESSION
from jaxmaml.data.decoders import INK_BELOW, Format
from jaxmaml.experiments import portable

WITHOUT_THE_PACKAGE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jaxmaml", "flax", "optax"):
            raise ImportError(f"{name} is not installed")

sys.meta_path.insert(0, Blocker())
import json, pathlib
import jax.export
import numpy as np

model = pathlib.Path(sys.argv[1])
exported = jax.export.deserialize(bytearray((model / "function.jax").read_bytes()))
inputs = np.load(sys.argv[2])
for count in (1, len(inputs)):
    found = np.asarray(exported.call(inputs[:count]))
np.save(sys.argv[3], found)
parameters = np.load(model / "parameters.npz")
print(json.dumps({name: parameters[name].shape for name in parameters.files}))
try:
    import jaxmaml
except ImportError:
    print("without jaxmaml")
"""


@pytest.fixture(scope="module")
def adapted():
    return trained_run(norm="transductive").adapt(SUPPORT)


def test_a_model_runs_without_this_package(adapted, tmp_path):
    adapted.export(tmp_path / "model")
    np.save(tmp_path / "inputs.npy", PIXELS)
    paths = [str(tmp_path / name) for name in ("model", "inputs.npy", "found.npy")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *paths],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shapes, last = done.stdout.splitlines()
    assert last == "without jaxmaml"
    np.testing.assert_allclose(
        np.load(tmp_path / "found.npy"), adapted.predict(PIXELS), rtol=1e-4, atol=1e-6
    )
    found = json.loads(shapes)
    assert found["params/head/kernel"] == [16, 3]
    assert "state/norm/0/mean" in found
    about = json.loads((tmp_path / "model" / "model.json").read_text())
    assert about["classes"] == ["cat", "dog", "emu"]
    assert about["input"] == {"shape": ["n", 4, 4, 1], "dtype": "uint8"}
    assert about["statistics"] == "the statistics of the support"
    assert about["preprocessing"]["before"]["mode"] == "L"


def _called(adapted, path, inputs):
    """Exports a model, and calls what the file holds."""
    adapted.export(path)
    exported = jax.export.deserialize(bytearray((path / "function.jax").read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    return exported.call(inputs)


def test_the_description_says_which_pixels_are_ink():
    ink = Format(28, "L", "nearest", ink=True)
    said = [
        portable.preprocessing(format, [0.5], [0.5])["before"]["ink"]
        for format in (ink, Format(28))
    ]
    assert said == [f"255 where the pixel is below {INK_BELOW}, 0 elsewhere", None]


@pytest.mark.parametrize("norm", ["layer", pytest.param("none", marks=pytest.mark.slow)])
def test_a_network_without_statistics_is_exported(norm, tmp_path):
    adapted = trained_run(norm=norm).adapt(SUPPORT)
    found = _called(adapted, tmp_path / "model", PIXELS)
    np.testing.assert_allclose(found, adapted.predict(PIXELS), rtol=1e-4, atol=1e-6)


def test_convolutions_and_pooling_are_exported(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
    trained = trained_run(
        model="conv", num_filters=4, pooled=True, norm="group", input_shape=(16, 16, 3)
    )
    support = {"inputs": pixels, "targets": np.arange(6) % 3}
    adapted = trained.adapt(support, num_inner_steps=0)  # which compiles no gradient
    found = _called(adapted, tmp_path / "model", pixels[:5])
    np.testing.assert_allclose(found, adapted.predict(pixels[:5]), rtol=1e-4, atol=1e-6)


def test_a_regressor_is_exported(tmp_path):
    support = {"inputs": [0.0, 1.0], "targets": [0.0, 1.0]}
    adapted = trained_run("maml", REGRESSION, (1,)).adapt(support)
    x = np.array([[0.5], [2.0]], np.float32)
    found = _called(adapted, tmp_path / "model", x)
    np.testing.assert_allclose(found, adapted.predict(x), rtol=1e-5)
    with pytest.raises(ValueError, match="model exists already"):
        adapted.export(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
