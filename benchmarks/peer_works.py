"""The works that benchmarks time, as jaxmaml computes them: a preset, its network and its tasks.

Pixels and labels are random, because the cost of a step does not depend on what they show.
`speed.py --against` builds these works with the code of two commits: keep the names of this module.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import jax
import numpy as np
import optax
import torchbench
from jax.sharding import Mesh

import jaxmaml
from jaxmaml import diagnostics, fitting, parallel
from jaxmaml.batching import ChunkSize
from jaxmaml.data import pools, sinusoid
from jaxmaml.experiments import candidates, learners, networks, presets
from jaxmaml.experiments.presets import Preset
from jaxmaml.types import Array, LossFn, MetaLearner, MetaParams, MetaState, Task

COLOR = presets.get("cifar-fs-5w1s")
CONV = presets.get("glyphs-5w1s")

PRESETS: dict[str, Preset] = {
    "conv-15q": presets.override(CONV, query=15),
    "conv-1q": CONV,
    "conv-5s": presets.override(CONV, shot=5, query=5),
    # 0.05 is the published rate of this network, for a mean loss.
    "conv-pooled": presets.override(
        CONV, shot=5, query=15, pooled=True, num_inner_steps=5, num_tasks=4, inner_lr=0.05
    ),
    "torchbench": torchbench.PRESET,
    "cifar-fs": COLOR,
    "mlp": presets.get("omniglot-mlp-5w1s"),
    "sinusoid": presets.get("sinusoid-5shot"),
}
"""The settings of each work; the order of the meta-gradient is chosen apart."""


class Problem(NamedTuple):
    """One work, ready to run.

    Attributes:
        preset: its settings.
        learner: MAML of the given order.
        loss_fn: the mean loss that is adapted to and scored.
        params: the initial parameters.
        tasks: the tasks of one outer step, leaves `[num_tasks, ...]`.
    """

    preset: Preset
    learner: MetaLearner
    loss_fn: LossFn
    params: MetaParams
    tasks: Task

    @property
    def chunk_size(self) -> Any:
        """The chunk size of the preset."""
        return self.preset.core_chunk_size


def image_shape(preset: Preset) -> tuple[int, int, int]:
    """Returns the shape of an image of a work: gray, or that of CIFAR."""
    return (32, 32, 3) if preset.dataset == COLOR.dataset else (28, 28, 1)


def shrink(preset: Preset) -> Preset:
    """Returns the same work at a size that takes a moment: a check of the code, not a measurement."""
    sizes = {"hidden_sizes": (16,) * len(preset.hidden_sizes)} if preset.model == "mlp" else {}
    query = min(preset.query, 3)
    return presets.override(preset, num_tasks=2, num_filters=8, query=query, **sizes)


def build(preset: Preset, order: str) -> Problem:
    """Returns the network, parameters and tasks of a preset, always the same ones.

    Args:
        preset: the settings.
        order: "exact" or "first".
    """
    if preset.name == torchbench.PRESET.name:
        loss_fn, params = torchbench.network(preset)
        adjoint, sgd = learners.ADJOINTS[order], optax.sgd(preset.inner_lr)
        learner = jaxmaml.maml(loss_fn, sgd, preset.num_inner_steps, adjoint=adjoint)
        return Problem(preset, learner, loss_fn, params, _tasks(preset))
    shape = (1,) if preset.is_regression else image_shape(preset)
    model, params, _ = networks.build(preset, shape, jax.random.key(0))
    spec = candidates.Spec(order, order, preset.inner_lr)
    learner = candidates.build(spec, preset, model, 0, jax.random.key(0)).learner
    return Problem(preset, learner, model.loss_fn, params, _tasks(preset))


def source(preset: Preset) -> Callable[[Array], Task]:
    """Returns a traceable `key -> tasks`, as training draws them."""
    if preset.is_regression:
        return sinusoid.sampler(num_tasks=preset.num_tasks, shot=preset.shot, query=preset.query)
    num_classes, num_images = 4 * preset.way, 20
    labels = np.repeat(np.arange(num_classes), num_images)
    images = np.random.default_rng(0).integers(
        0, 256, (labels.size, *image_shape(preset)), np.uint8
    )
    pool = pools.from_arrays(images, labels, [str(number) for number in range(num_classes)])
    return pools.sampler(
        pool, num_tasks=preset.num_tasks, way=preset.way, shot=preset.shot, query=preset.query,
        rotate=preset.rotate_train,
    )  # fmt: skip


def gradient(
    problem: Problem, mesh: Mesh, chunk_size: ChunkSize
) -> Callable[[MetaParams, Task], MetaParams]:
    """Returns `(params, tasks) -> meta-gradient`, with the tasks spread over a mesh."""

    def grads(params: MetaParams, tasks: Task) -> MetaParams:
        return jaxmaml.meta_grad(problem.learner, params, tasks, chunk_size=chunk_size, mesh=mesh)[
            1
        ]

    return grads


def place(problem: Problem, mesh: Mesh) -> tuple[MetaParams, Task]:
    """Returns (params, tasks) where `gradient` reads them, so that a timed call moves nothing."""
    return parallel.place(problem.params, mesh), parallel.spread(problem.tasks, mesh)[0]


def optimizer(preset: Preset) -> optax.GradientTransformation:
    """Returns the outer optimizer."""
    return optax.adam(preset.outer_lr)


def init_state(problem: Problem, mesh: Mesh) -> MetaState:
    """Returns the state before the first outer step, on every device of a mesh."""
    adam = optimizer(problem.preset)
    return parallel.place(jaxmaml.init_state(problem.learner, adam, problem.params), mesh)


def training_loop(problem: Problem, mesh: Mesh, num_steps: int) -> Callable[[], Any]:
    """Returns a call that trains for `num_steps` outer steps, sampling included, and blocks."""
    meta_state = init_state(problem, mesh)
    program = fitting.compile_program(
        problem.learner, optimizer(problem.preset), meta_state, source(problem.preset),
        key=jax.random.key(0), chunk_size=problem.chunk_size, num_steps_per_dispatch=num_steps,
        mesh=mesh,
    )  # fmt: skip
    states = fitting.States(meta_state, meta_state)
    return lambda: jax.block_until_ready(program.run(states, num_steps))


def in_float64(problem: Problem) -> tuple[tuple[MetaParams, Task], MetaParams]:
    """Returns ((params, tasks), their meta-gradient) in float64, as NumPy arrays."""

    def widen(leaf: Any) -> np.ndarray:
        is_float = np.issubdtype(leaf.dtype, np.floating)
        return np.asarray(leaf, np.float64 if is_float else None)

    inputs = jax.tree.map(widen, (problem.params, problem.tasks))
    step = lambda params, tasks: jaxmaml.meta_grad(problem.learner, params, tasks, chunk_size=1)[1]
    with jax.enable_x64(True):
        return inputs, jax.tree.map(np.asarray, jax.jit(step)(*inputs))


def gflop(problem: Problem) -> float:
    """Returns the GFLOP of one outer step as jaxmaml computes it, recomputation included."""
    step = lambda params, tasks: jaxmaml.meta_grad(problem.learner, params, tasks)[1]
    return diagnostics.count_flops(step, problem.params, problem.tasks) / 1e9


def ideal_gflop(problem: Problem, order: str) -> float:
    """Returns the GFLOP of one outer step of an implementation that computes nothing twice.

    A backward pass costs two forward passes. The tangents of a forward and a backward pass cost as
    much as these two passes. With T inner steps on S support examples, Q query examples and the cost
    F of a forward pass of one example, first order costs 3F(TS + Q), and exact 6F·T·S more.
    """
    preset = problem.preset
    query = jax.tree.map(lambda leaf: leaf[0, :1], problem.tasks.query)
    forward = diagnostics.count_flops(problem.loss_fn, problem.params, query)
    adapted_on = preset.num_inner_steps * preset.way * preset.shot
    passes = 3 * (adapted_on + preset.way * preset.query)
    passes += 6 * adapted_on if order == "exact" else 0
    return preset.num_tasks * forward * passes / 1e9


def options(preset: Preset) -> dict[str, Any]:
    """Returns the size of a work, as its rows state it."""
    names = ("way", "shot", "query", "num_tasks", "num_inner_steps", "num_filters")
    return {name: value for name, value in dataclasses.asdict(preset).items() if name in names}


def _tasks(preset: Preset) -> Task:
    if preset.is_regression:
        return source(preset)(jax.random.key(0))
    return common.image_tasks(
        preset.num_tasks, preset.way, preset.shot, preset.query, image_shape(preset)
    )
