"""Guards on what XLA itself counts, which noise does not change: memory, operations, size, platforms."""

import functools
import inspect
import re

import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import jaxmaml
from jaxmaml import fitting, nn
from jaxmaml.data import sinusoid
from jaxmaml.inner import EXACT

WAY, SHOT, QUERY, SIDE = 5, 2, 6, 16
CALLBACK = re.compile(r'custom_call_target="[^"]*callback[^"]*"', re.IGNORECASE)
TRANSFER = re.compile(r" (infeed|outfeed|send|recv)\(")


def _conv4():
    module = nn.Conv4(
        WAY, image_shape=(SIDE, SIDE, 1), num_filters=16, pooled=True, rngs=nnx.Rngs(0)
    )
    apply_fn, params = nn.from_nnx(module)
    return nn.cross_entropy(apply_fn), params


def _batch(num_tasks, num):
    return {
        "inputs": jax.ShapeDtypeStruct((num_tasks, WAY * num, SIDE, SIDE, 1), jnp.float32),
        "targets": jax.ShapeDtypeStruct((num_tasks, WAY * num), jnp.int32),
    }


def _num_bytes(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@functools.cache
def _compiled(num_inner_steps, adjoint=EXACT):
    """The meta-gradient of Conv4 over two tasks, one at a time: (temporary bytes, optimized HLO)."""
    loss_fn, params = _conv4()
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), num_inner_steps, adjoint=adjoint)
    tasks = jaxmaml.Task(_batch(2, SHOT), _batch(2, QUERY))
    run = lambda params, tasks: jaxmaml.meta_grad(learner, params, tasks, chunk_size=1)[:2]
    compiled = jax.jit(run).lower(params, tasks).compile()
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    assert analysis is not None
    assert text is not None
    return analysis.temp_size_in_bytes, text


def test_memory_of_an_exact_step():
    """One test, because its programs take seconds to compile and workers share nothing."""
    unit, slack = _num_bytes(_conv4()[1]), 4096  # slack for inner losses and alignment
    used = {number: _compiled(number)[0] for number in (1, 4, 16)}
    assert used[4] - used[1] <= 1.1 * 3 * unit + slack
    assert used[16] - used[4] <= 1.1 * 12 * unit + slack
    first, _ = _compiled(4, jaxmaml.FirstOrder())  # whatever the number of steps
    # A single step shows the values of its support pass and gradient beside those of the query pass.
    assert used[1] <= 1.5 * first
    assert used[4] <= 1.1 * first
    assert used[16] <= 1.2 * first


@pytest.mark.parametrize(("checkpoint_every", "stored"), [(None, 4 / 3), (1, 1.0)])
def test_memory_of_an_inner_adam_grows_by_what_a_step_must_store(checkpoint_every, stored):
    """Parameters and two moments, and the gradient unless it is recomputed."""
    adam = optax.adam(0.1, eps_root=1e-8)
    adjoint = jaxmaml.Exact(checkpoint_every=checkpoint_every)
    make = functools.partial(jaxmaml.maml, optimizer=adam, adjoint=adjoint)
    (few, unit), (many, _) = (_deep_memory(make, number, 64, 8, 4) for number in (4, 12))
    assert (many - few) / (8 * 3 * unit) <= 1.05 * stored


def _deep_memory(make, num_inner_steps, width, depth, num_examples):
    """(temporary bytes of one meta-gradient of a network without branches, bytes of its parameters)."""
    params = {f"w{i}": jnp.full((width, width), 0.01) for i in range(depth)}
    batch = jax.ShapeDtypeStruct((num_examples, width), jnp.float32)

    def loss_fn(params, x):
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    learner = make(loss_fn, num_inner_steps=num_inner_steps)
    run = jax.jit(jax.grad(learner.loss, has_aux=True))
    analysis = run.lower(params, jaxmaml.Task(batch, batch)).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes, _num_bytes(params)


def _multi_step(loss_fn, optimizer, num_inner_steps):
    weights = jaxmaml.multi_step_weights(num_inner_steps, 100)
    return jaxmaml.maml(loss_fn, optimizer, num_inner_steps, query_weights=weights)


@pytest.mark.parametrize(
    ("make", "growth"),
    [
        # The parameters of each step, for its own gradient and for the query pass after it.
        (_multi_step, 2.0),
        (jaxmaml.imaml, 0.0),
    ],
    ids=["multi-step loss", "imaml"],
)
def test_memory_over_2_and_20_inner_steps(make, growth):
    """At a size where the activations of a pass are eight times the parameters."""
    make = functools.partial(make, optimizer=optax.sgd(0.1))
    (few, unit), (many, _) = (_deep_memory(make, number, 32, 4, 256) for number in (2, 20))
    assert many - few <= 1.1 * growth * 18 * unit + 4096


def test_an_exact_step_does_no_more_than_the_mathematics_and_is_scanned():
    """Five layers; the images have no gradient, so that the first layer has one product fewer.

    The directional derivative needs no gradient of the parameters themselves, only its tangent.
    """
    gradient = 3 * 5 - 1
    directional_derivative = (5 + 4) + (2 * 5 - 1) + (2 * 5 - 1) + 2 * 4  # values, then tangents
    _, text = _compiled(4)
    assert text.count(" dot(") <= gradient + directional_derivative + gradient
    assert "convolution(" not in text
    assert len(_compiled(16)[1].splitlines()) == len(text.splitlines())


def _sinusoid():
    """(learner, outer optimizer, its state, source) of the regression, 25 tasks."""
    apply_fn, params = nn.from_nnx(nn.MLP(1, 1, rngs=nnx.Rngs(0)))
    learner = jaxmaml.maml(nn.mean_squared_error(apply_fn), optax.sgd(0.01), 1)
    optimizer = optax.adam(1e-3)
    source = sinusoid.sampler(num_tasks=25, shot=5, query=5)
    return learner, optimizer, jaxmaml.init_state(learner, optimizer, params), source


def _leaves_the_device(program):
    text = inspect.getclosurevars(program.run).nonlocals["compiled"].as_text()
    assert "while(" in text
    return bool(TRANSFER.search(text) or CALLBACK.search(text))


def test_the_training_loop_does_not_leave_the_device():
    learner, optimizer, meta_state, source = _sinusoid()
    options = {"key": jax.random.key(0), "num_steps_per_dispatch": 10}
    program = fitting.compile_program(learner, optimizer, meta_state, source, **options)
    assert not _leaves_the_device(program)

    def chatty(key):
        jax.debug.print("{}", jax.random.key_data(key))
        return source(key)

    # The guard would see it.
    assert _leaves_the_device(
        fitting.compile_program(learner, optimizer, meta_state, chatty, **options)
    )


def _outer_step(learner, optimizer, chunk_size):
    return jax.jit(functools.partial(jaxmaml.meta_step, learner, optimizer, chunk_size=chunk_size))


def _lower_for(platform, monkeypatch, function, *args):
    """Returns the exported program of a function that is traced as if it ran on `platform`."""
    name = {"cuda": "gpu", "tpu": "tpu"}[platform]
    monkeypatch.setattr(jax, "default_backend", lambda: name)
    return jax.export.export(function, platforms=[platform])(*args)


@pytest.mark.parametrize(("platform", "chunk_size"), [("cuda", "auto"), ("tpu", 1)])
def test_exact_outer_step_of_conv4_lowers_without_the_device(platform, chunk_size, monkeypatch):
    loss_fn, params = _conv4()
    learner, optimizer = jaxmaml.maml(loss_fn, optax.sgd(0.1), 2), optax.adam(1e-3)
    tasks = jaxmaml.Task(_batch(4, SHOT), _batch(4, QUERY))
    meta_state = jaxmaml.init_state(learner, optimizer, params)
    step = _outer_step(learner, optimizer, chunk_size)
    exported = _lower_for(platform, monkeypatch, step, meta_state, tasks)
    assert exported.platforms == (platform,)


@pytest.mark.parametrize("platform", ["cuda", pytest.param("tpu", marks=pytest.mark.slow)])
def test_exact_outer_step_of_the_sinusoid_lowers_with_its_sampler(platform, monkeypatch):
    learner, optimizer, meta_state, source = _sinusoid()
    outer_step = _outer_step(learner, optimizer, "auto")
    step = jax.jit(lambda meta_state, key: outer_step(meta_state, source(key)))
    exported = _lower_for(platform, monkeypatch, step, meta_state, jax.random.key(0))
    assert exported.platforms == (platform,)
