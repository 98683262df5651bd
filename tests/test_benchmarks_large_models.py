"""The arithmetic and the mistakes of the benchmark of large models, whose programs compile slowly."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

language_model = importlib.import_module("language_model")
large_models = importlib.import_module("large_models")


@pytest.mark.parametrize(("name", "number"), [("125M", 125e6), ("350M", 355e6), ("1.3B", 1.315e9)])
def test_models_have_the_size_of_their_name(name, number):
    shapes = language_model.base_shapes(language_model.MODELS[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == pytest.approx(number, rel=0.01)


def test_what_must_be_held_is_counted_in_copies_of_the_parameters():
    model, names = language_model.MODELS["1.3B"], large_models.VARIANTS
    unit = large_models.estimate(model, 4, names["first order"]) / 5
    count = lambda name, steps: large_models.estimate(model, steps, names[name]) / unit
    assert count("exact, checkpoint_every=1", 4) == pytest.approx(2 + 3 * 4 + 8)
    assert count("exact", 8) - count("exact", 4) == pytest.approx(4 * 4)
    assert count("LoRA adapted and learned", 8) < 1.5


def test_the_loss_in_chunks_is_the_mean_cross_entropy():
    model = language_model.QUICK
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    x, embeddings = rng.normal(size=(5, 8)), rng.normal(size=(7, 8))
    target = np.array([0, 6, 3, 3, 1])
    found = language_model._cross_entropy(jnp.asarray(embeddings), jnp.asarray(x), target)
    scores = x @ embeddings.T
    wanted = np.log(np.exp(scores).sum(-1)) - scores[np.arange(5), target]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)

    # Attention sees no later position.
    query, key, value = (
        draw(jax.ShapeDtypeStruct((model.sequence, 1, 64), jnp.float32)) for _ in "qkv"
    )
    before = language_model._attention(query, key, value)
    after = language_model._attention(query, key.at[-1].set(0), value.at[-1].set(0))
    np.testing.assert_array_equal(before[:-1], after[:-1])


def test_an_unknown_target_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit_:
        large_models.main(Namespace(target="h999", quick=True, out=None, resume=False))
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --target h999: ")
    assert error.count("\n") == 1
