"""Exact against first-order MAML: at one shared inner rate, each at its best, and layer by layer.

    python benchmarks/orders.py glyphs-5w1s sinusoid-5shot --out orders.jsonl --plots DIR

Both orders are trained on each preset at every rate of its grid, from the same start and on the same
episodes. There is one row per run: test score after every inner step, time, memory. There is one row
per preset: the cosine of the first-order and the exact meta-gradient and the ratio of their norms,
layer by layer, along the exact run at the preset's rate; `--plots` draws them too. Without
tensorflow-datasets, `--data` names the .npz that `reproduce.py export` wrote.
"""

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
import runs

import jaxmaml
from jaxmaml import diagnostics
from jaxmaml.experiments import learners, presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.experiment import Experiment, build_candidate, step_tasks
from jaxmaml.files import check_absent
from jaxmaml.types import Array, MetaLearner, MetaParams, MetaState, Task

GRIDS = {"sinusoid": (0.003, 0.01, 0.03), "glyphs": (0.1, 0.4, 1.0), "omniglot": (0.4, 1.0, 2.0)}
"""Inner rates by dataset, beside the preset's own."""
COLUMNS = [
    *("preset", "order", "inner_lr", "headline", "ci95", "validation", "ms_per_outer_step", "mib"),
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
    picture = None if options.plots is None else options.plots / f"{name}-agreement.png"
    if picture is not None:
        check_absent(picture)

    # What all runs share.
    preset = presets.override(presets.get(name), num_outer_steps=options.num_outer_steps)
    if options.quick:
        changes = {"num_filters": 4, "hidden_sizes": (4,), "num_val_tasks": 5}
        preset = presets.override(preset, num_outer_steps=12, **changes)
    experiment = runs.build(preset, options.seed, options)
    watch = _Watch(experiment)
    shared = {
        "preset": preset.name, "seed": options.seed, "num_outer_steps": preset.num_outer_steps
    }  # fmt: skip

    # One run per rate and order. One of them is watched.
    layers: dict[str, Any] = {}
    for rate in sorted({*GRIDS[preset.dataset], preset.inner_lr}):
        for order in learners.ADJOINTS:
            is_watched = order == "exact" and rate == preset.inner_lr
            probe = watch if is_watched else None
            measure = functools.partial(_run, experiment, order, rate, options, probe)
            (row,) = common.Rows(options, table="run").of(
                {**shared, "order": order, "inner_lr": rate}, measure
            )
            layers = row["watched"] or layers
            yield row

    # Both meta-gradients along the watched run.
    if picture is not None:
        _plot(layers, picture)
    yield {**shared, "table": "layers", **layers}


def _run(
    experiment: Experiment,
    order: str,
    rate: float,
    options: argparse.Namespace,
    watch: "_Watch | None",
) -> dict[str, Any]:
    """Returns the row of a run, with what was watched along it."""
    candidate = build_candidate(experiment, Spec(f"{order}@{rate:g}", order, rate))
    row = runs.row(runs.train(experiment, candidate, options, probe=watch))
    watched = None if watch is None else {"step": watch.steps, "layers": watch.found}
    return {**row, "watched": watched}


class _Watch:
    """The probe of a run: it compares both meta-gradients at the preset's rate, layer by layer.

    Attributes:
        steps: the outer steps at which it was called.
        found: {layer: {"cosine": [...], "norm_ratio": [...]}}; "" is the whole gradient.
    """

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

        # What accumulates along the run.
        self._agreements, self._experiment = jax.jit(agreements), experiment
        self.steps: list[int] = []
        self.found: dict[str, dict[str, list[float]]] = {}

    def __call__(self, meta_state: MetaState) -> None:
        """Appends the agreement at a state, on the tasks of its next step."""
        step = int(meta_state.step)
        tasks = step_tasks(self._experiment, step)
        for layer, pair in self._agreements(jax.device_get(meta_state.params), tasks).items():
            lists = self.found.setdefault(layer, {"cosine": [], "norm_ratio": []})
            for values, number in zip(lists.values(), pair, strict=True):
                values.append(float(number))
        self.steps.append(step)


def _plot(watched: dict[str, Any], path: Path) -> None:
    """Draws the agreement of the whole gradient and of the layers with weights."""
    from jaxmaml.experiments import plots  # needs matplotlib, which nothing else here does

    path.parent.mkdir(parents=True, exist_ok=True)
    # Scales and offsets of the normalization agree as their layer does, and would hide it.
    layers = {layer: found for layer, found in watched["layers"].items() if "norm" not in layer}
    whole = layers.pop("")
    plots.save(plots.gradient_agreement(watched["step"], **whole, layers=layers), path)


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plots", type=Path, help="directory for a plot of each preset")
    runs.add_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
