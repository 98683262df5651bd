"""A process of several that train together; `test_processes.py` starts them.

    python joined.py COORDINATOR NUM_PROCESSES PROCESS_ID NUM_DEVICES OUT NAME ...

It makes what the functions of `CASES` return, and process 0 writes their leaves to the file OUT.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import jax.numpy as jnp
import numpy as np
import optax
from problems import smooth

import jaxmaml
from jaxmaml import parallel, processes
from jaxmaml.data import pools, stored_images, stream

NUM_STEPS = 50
"""Outer steps of a training."""
NUM_STEPS_WITH_ADAM = 5
"""Inside, Adam lets rounding grow: by a factor of 1e8 in the first 30 outer steps."""


def _fitted(learner, params, source, *, num_steps=NUM_STEPS, state=(), axes=(), **options):
    """Returns the losses of a training and its state, on every process, over all devices."""
    # With its default eps, Adam amplifies the rounding of gradients that are zero, as of a head that
    # no loss depends on.
    mesh, optimizer = parallel.make_mesh(), optax.adam(1e-2, eps=1e-5)
    meta_state = jaxmaml.init_state(learner, optimizer, params, state)
    specs = parallel.split_specs(meta_state, mesh, axes)
    meta_state = parallel.place(meta_state, mesh, specs)
    items = jaxmaml.fit(
        learner, optimizer, meta_state, source, num_steps, mesh=mesh, num_steps_per_dispatch=25,
        **options,
    )  # fmt: skip
    states, metrics = zip(*items, strict=True)
    losses = np.concatenate([row["loss"] for row in metrics])
    return parallel.to_host((states[-1].params, states[-1].state, losses))


def _own(tasks, mesh):
    """The rows of this process, as an iterable of tasks must give them."""
    rows = jaxmaml.sources.rows(tasks.query["targets"].shape[0], parallel.share_of(mesh))
    return jax.tree.map(lambda leaf: leaf[rows], tasks)


def _of_learner(name, num_tasks=3):
    """A learner of the shared table on three tasks, which two processes do not divide."""
    from test_learners import ROWS

    problem = smooth(jnp.float64)
    learner = ROWS[name].learner(problem)
    tasks = jax.tree.map(lambda leaf: leaf[:num_tasks], problem.tasks)
    num_steps = NUM_STEPS_WITH_ADAM if "adam" in name else NUM_STEPS
    source = [_own(tasks, parallel.make_mesh())] * num_steps
    return _fitted(learner, problem.params, source, num_steps=num_steps)


def _sinusoid(**options):
    source = jaxmaml.data.sinusoid.sampler(num_tasks=5, shot=3, query=4)
    loss_fn = lambda params, batch: jnp.mean((batch["inputs"] @ params - batch["targets"]) ** 2)
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.01), 2)
    return _fitted(learner, jnp.ones((1, 1)), source, key=jax.random.key(0), **options)


def _images(kind):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 4, 4, 1), np.uint8)
    images = stored_images.from_arrays(pixels, np.arange(40) % 4, "abcd")
    episode: dict[str, Any] = {"num_tasks": 3, "way": 2, "shot": 1, "query": 2}
    if kind == "pool":
        source: Any = pools.sampler(pools.from_images(images), **episode)
    else:
        source = stream.sampler(images, **episode)

    def loss_fn(params, batch):
        logits = batch["inputs"].reshape(-1, 16) @ params
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return losses.mean()

    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 2)
    params = jnp.zeros((16, 2))
    trained = _fitted(learner, params, source, key=jax.random.key(1), num_steps=30)
    scores = jaxmaml.evaluate(
        learner, loss_fn, jaxmaml.init_state(learner, optax.sgd(0.1), params), source,
        num_tasks=7, key=jax.random.key(2), mesh=parallel.make_mesh(),
    )  # fmt: skip
    return trained, scores


def _split():
    """Parameters and optimizer state that are split over all devices."""
    problem = smooth(jnp.float64)
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), 2)
    tasks = jax.tree.map(lambda leaf: leaf[:3], problem.tasks)
    source = [_own(tasks, parallel.make_mesh())] * NUM_STEPS
    return _fitted(learner, problem.params, source, axes=("tasks",))


CASES = {
    "sinusoid": _sinusoid,
    "pool": lambda: _images("pool"),
    "stream": lambda: _images("stream"),
    "split": _split,
}
"""Other names are those of learners of the shared table."""


def made(names):
    """Returns the leaves of all cases, by name."""
    found = {}
    for name in names:
        value = CASES[name]() if name in CASES else _of_learner(name)
        for i, leaf in enumerate(jax.tree.leaves(value)):
            found[f"{name}/{i}"] = np.asarray(leaf)
    return found


def main(coordinator, num_processes, process_id, num_devices, out, *names):
    jax.config.update("jax_num_cpu_devices", int(num_devices))
    jax.config.update("jax_enable_x64", True)
    if int(num_processes) > 1:
        processes.initialize(coordinator, int(num_processes), int(process_id))
    assert jax.device_count() == int(num_processes) * int(num_devices)
    found = made(names)
    if processes.is_first():
        np.savez(Path(out), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
