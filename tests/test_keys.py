"""No PRNG key is used twice: in tasks from every source, in training, and in diagnostics."""

import equinox as eqx
import jax
import numpy as np
import optax
import pytest
from key_recorder import KeyRecorder

import jaxmaml
from jaxmaml.data import pools, sinusoid, stored_images, stream, variable
from jaxmaml.data.augmentation import Augment
from jaxmaml.diagnostics import permutations
from jaxmaml.types import Task

AUGMENT = Augment(crop=1)
IMAGES = stored_images.from_arrays(
    np.zeros((15, 2, 2, 1), np.uint8), np.arange(15) % 3, ["a", "b", "c"]
)


@pytest.fixture
def recorder():
    return KeyRecorder()


@pytest.mark.parametrize(
    "program",
    [
        lambda key: jax.random.uniform(key) + jax.random.uniform(key),
        lambda key: jax.random.uniform(key) + jax.random.uniform(jax.random.split(key)[0]),
        lambda key: (
            jax.random.uniform(jax.random.fold_in(key, 1))
            + jax.random.uniform(jax.random.split(key, 3)[1])
        ),
        lambda key: (
            jax.random.uniform(jax.random.split(key)[0])
            + jax.random.uniform(jax.random.split(key, 3)[0])
        ),
    ],
    ids=["drawn twice", "drawn and split", "folded and split", "split twice"],
)
def test_the_recorder_finds_keys_that_are_used_twice(program, recorder):
    jax.jit(jax.vmap(program))(jax.random.split(recorder.key(0), 2))
    assert recorder.drawn_twice() or recorder.mixed()


def assert_used_once(recorder):
    assert len(recorder.uses) > 1
    assert not recorder.mixed()
    assert not recorder.drawn_twice()


SOURCES = {
    "pool": pools.sampler(
        pools.from_images(IMAGES), num_tasks=2, way=2, shot=1, query=1, rotate=True, augment=AUGMENT
    ),
    "variable": variable.sampler(
        pools.from_images(IMAGES),
        num_tasks=2,
        min_way=2,
        max_way=2,
        max_query=1,
        max_support=3,
        augment=AUGMENT,
    ),
    "sinusoid": sinusoid.sampler(num_tasks=2, shot=1, query=1),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_uses_every_key_once(name, recorder):
    tasks = jaxmaml.sources.batches(SOURCES[name], recorder.key(0))
    for _ in range(2):
        jax.block_until_ready(next(tasks))
    assert_used_once(recorder)


@pytest.mark.slow
def test_a_stream_uses_every_key_once(recorder, monkeypatch):
    monkeypatch.setattr(stream, "STEPS_PER_BLOCK", 2)
    source = stream.sampler(
        IMAGES, num_tasks=2, way=2, shot=1, query=1, rotate=True, augment=AUGMENT
    )
    with source.start(recorder.key(0)) as tasks:
        for _ in range(3):
            jax.block_until_ready(next(tasks))
    assert_used_once(recorder)


def test_permutations_use_every_key_once(recorder):
    permutations.label_permutations(4, key=recorder.key(0), num_permutations=3)
    assert_used_once(recorder)


@pytest.mark.slow
def test_training_with_dropout_uses_every_key_in_one_way(recorder):
    """The backward pass repeats the draws of the forward pass, so keys are drawn from again."""
    module = eqx.nn.Sequential(
        [eqx.nn.Linear(1, 2, key=jax.random.key(0)), eqx.nn.Dropout(0.5), eqx.nn.Dropout(0.5)]
    )
    model, params = jaxmaml.nn.from_equinox(module)
    learner = jaxmaml.maml(jaxmaml.nn.mean_squared_error(model), optax.sgd(0.1), 2)
    optimizer = optax.sgd(0.1)

    def source(key):
        names = ("inputs", "targets", "support", "query")
        keys = dict(zip(names, jax.random.split(key, 4), strict=True))
        shared = {
            "inputs": jax.random.normal(keys["inputs"], (2, 3, 1)),
            "targets": jax.random.normal(keys["targets"], (2, 3, 2)),
        }
        support, query = (shared | {"key": jax.random.split(keys[n], 2)} for n in names[2:])
        return Task(support, query)

    meta_state = jaxmaml.init_state(learner, optimizer, params)
    for _ in jaxmaml.fit(learner, optimizer, meta_state, source, 2, key=recorder.key(0)):
        pass
    assert len(recorder.uses) > 1
    assert not recorder.mixed()
