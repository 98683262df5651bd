"""Exact against first-order MAML: at one shared inner rate, each at its best, and layer by layer.

    python benchmarks/orders.py glyphs-5w1s sinusoid-5shot --out orders.jsonl --plots DIR

Both orders are trained on each preset at every rate of its grid, from the same start and on the same
episodes, for each seed. There is one row per run: test score after every inner step, time, memory.
There is one row per preset: the cosine of the first-order and the exact meta-gradient and the ratio of
their norms, layer by layer, along the exact run of the first seed at the preset's rate. `--plots` draws
them, and the scores by rate and by inner step. Without tensorflow-datasets, `--data` names the .npz
that `reproduce.py export` wrote.
"""

import argparse
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import jax
import numpy as np
import runs

import jaxmaml
from jaxmaml import diagnostics
from jaxmaml.experiments import learners, presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import Experiment, build_candidate, step_tasks, with_seed
from jaxmaml.files import check_absent
from jaxmaml.types import Array, MetaLearner, MetaParams, MetaState, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRIDS = {
    "sinusoid": (0.003, 0.01, 0.03),
    "glyphs": (0.1, 0.4, 1.0),
    "omniglot": (0.4, 1.0, 2.0),
    "cifar-fs": (0.1, 0.5),
}
"""Inner rates by dataset, beside the preset's own."""
COLUMNS = [
    *("preset", "order", "inner_lr", "seed", "headline", "ci95", "validation"),
    *("ms_per_outer_step", "mib"),
]


def main() -> None:
    """Trains, tests, prints and appends the rows."""
    options = _options()
    common.use_all_cores()
    rows, layers = [], []
    for name in options.presets:
        for row in _measure(name, options):
            (rows if row["table"] == "run" else layers).append(row)
    common.print_table(rows, COLUMNS)
    for row in layers:
        print(f"\n{row['preset']}: first order against exact, along the exact run")
        common.print_table(_by_layer(row), ["layer", "outer step", "cosine", "norm ratio"])


def _measure(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields the rows of one preset, each as soon as it is appended."""
    pictures = {}
    if options.plots is not None:
        options.plots.mkdir(parents=True, exist_ok=True)
        pictures = {kind: options.plots / f"{name}-{kind}.png" for kind in ("agreement", "scores")}
    for picture in pictures.values():
        check_absent(picture)

    # What all runs share.
    preset = presets.override(presets.get(name), num_outer_steps=options.num_outer_steps)
    if options.quick:
        changes = {"num_filters": 4, "hidden_sizes": (4,), "num_val_tasks": 5}
        preset = presets.override(preset, num_outer_steps=12, **changes)
    experiment = runs.build(preset, options.seed, options)
    watch = _Watch(experiment)
    shared = {
        "preset": preset.name, "num_outer_steps": preset.num_outer_steps,
        "num_test_tasks": runs.num_test_tasks(options),
    }  # fmt: skip

    # One run per seed, rate and order. One of them is watched.
    found, layers = [], {}
    rates = sorted({*GRIDS[preset.dataset], preset.inner_lr})
    seeds = range(options.seed, options.seed + options.num_seeds)
    for seed, rate, order in itertools.product(seeds, rates, learners.ADJOINTS):
        is_watched = (seed, rate, order) == (options.seed, preset.inner_lr, "exact")
        probe = watch if is_watched else None
        measure = functools.partial(_run, with_seed(experiment, seed), order, rate, options, probe)
        (row,) = common.Rows(options, table="run").of(
            {**shared, "order": order, "inner_lr": rate, "seed": seed}, measure
        )
        found.append(row)
        layers = row["watched"] or layers
        yield row

    # Both meta-gradients along the watched run, and the scores of all runs.
    if pictures:
        from jaxmaml.experiments import plots  # needs matplotlib, which nothing else here does

        plots.save(_agreement(layers), pictures["agreement"])
        plots.save(_scores(preset, found), pictures["scores"])
    yield {**shared, "seed": options.seed, "table": "layers", **layers}


def _run(
    experiment: Experiment,
    order: str,
    rate: float,
    options: argparse.Namespace,
    watch: "_Watch | None",
) -> dict[str, Any]:
    """Returns the row of a run, with what was watched along it."""
    candidate = build_candidate(experiment, Spec(f"{order}@{rate:g}", order, rate))
    run = runs.train(experiment, candidate, options, probe=watch)
    return {**runs.row(run), "watched": None if watch is None else _watched(run.probed)}


def _watched(probed: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns {"step": [...], "layers": {layer: {"cosine": [...], "norm_ratio": [...]}}}."""
    layers = {
        layer: {
            name: [found["layers"][layer][i] for found in probed]
            for i, name in enumerate(("cosine", "norm_ratio"))
        }
        for layer in probed[0]["layers"]
    }
    return {"step": [found["step"] for found in probed], "layers": layers}


class _Watch:
    """The probe of a run: it compares both meta-gradients at the preset's rate, layer by layer."""

    def __init__(self, experiment: Experiment):
        rate, chunk_size = experiment.preset.inner_lr, experiment.preset.core_chunk_size

        # Both learners.
        exact, first = (
            build_candidate(experiment, Spec(order, order, rate)).learner
            for order in ("exact", "first")
        )

        # Their agreement, in one program.
        def gradient(learner: MetaLearner, params: MetaParams, tasks: Task) -> MetaParams:
            return jaxmaml.meta_grad(learner, params, tasks, chunk_size=chunk_size)[1]

        def agreements(params: MetaParams, tasks: Task) -> dict[str, tuple[Array, Array]]:
            grads, reference = gradient(first, params, tasks), gradient(exact, params, tasks)
            by_layer = diagnostics.agreement_by_layer(grads, reference)
            return {"": diagnostics.agreement(grads, reference), **by_layer}

        self._agreements, self._experiment = jax.jit(agreements), experiment

    def __call__(self, meta_state: MetaState) -> dict[str, Any]:
        """Returns (cosine, norm ratio) of each layer at a state, on the tasks of its next step.

        Checkpoints keep it. The layer "" is the whole gradient.
        """
        step = int(meta_state.step)
        tasks = step_tasks(self._experiment, step)
        found = self._agreements(jax.device_get(meta_state.params), tasks)
        layers = {layer: [float(number) for number in pair] for layer, pair in found.items()}
        return {"step": step, "layers": layers}


def _agreement(watched: dict[str, Any]) -> "Figure":
    """Draws the agreement of the whole gradient and of the layers with weights."""
    from jaxmaml.experiments import plots

    # Scales and offsets of the normalization agree as their layer does, and would hide it.
    layers = {layer: found for layer, found in watched["layers"].items() if "norm" not in layer}
    whole = layers.pop("")
    return plots.gradient_agreement(watched["step"], **whole, layers=layers)


def _scores(preset: presets.Preset, rows: list[dict[str, Any]]) -> "Figure":
    """Draws the mean over seeds of the scores of every order and rate, by inner step."""
    from jaxmaml.experiments import plots

    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['order']}@{row['inner_lr']:g}", []).append(row)
    curves = {
        label: {
            "mean": np.mean([row["mean_per_step"] for row in group], axis=0),
            "ci95": runs.ci95_over_seeds([row["ci95_per_step"] for row in group]),
        }
        for label, group in groups.items()
    }
    headline = rows[0]["headline_step"]
    return plots.metric_per_step(curves, ylabel=f"test {preset.metric.name}", headline=headline)


def _by_layer(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a few outer steps, for the terminal."""
    chosen = np.unique(np.linspace(0, len(row["step"]) - 1, 3).round().astype(int))
    return [
        {
            "layer": layer or "all", "outer step": row["step"][i],
            "cosine": values["cosine"][i], "norm ratio": values["norm_ratio"][i],
        }
        for layer, values in row["layers"].items()
        for i in chosen
    ]  # fmt: skip


def _options() -> argparse.Namespace:
    parser = common.parser(__doc__)
    names = [name for name, preset in presets.PRESETS.items() if preset.dataset in GRIDS]
    parser.add_argument("presets", nargs="+", choices=names)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--num-seeds", type=int, default=1)
    parser.add_argument("--plots", type=Path, help="directory for the plots of each preset")
    runs.add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
