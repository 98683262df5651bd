"""Exact against first-order MAML: at one shared inner rate, each at its best, and layer by layer.

    python benchmarks/orders.py glyphs-5w1s sinusoid-5shot --out orders.jsonl --plots DIR

For each preset both orders are trained at every rate of its grid from the same start on the same
episodes. One row a run: test score after every inner step, time, memory. One row a preset: the cosine
of the first-order and the exact meta-gradient, and the ratio of their norms, layer by layer along the
exact run at the preset's rate; with `--plots` also a picture. Without tensorflow-datasets, `--data`
names the .npz that `reproduce.py export` writes.
"""

import argparse
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np
import reproduce
from jaxmaml.train import experiment, family, presets
from jaxmaml.train.experiment import Experiment, Spec

import jaxmaml
from jaxmaml import diagnostics

GRIDS = {"sinusoid": (0.003, 0.01, 0.03), "glyphs": (0.1, 0.4, 1.0), "omniglot": (0.4, 1.0, 2.0)}
"""Inner rates by data set; the preset's own is among them."""
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
            common.emit([{"quick": options.quick, **row}], options.out)
            (rows if row["table"] == "run" else layers).append(row)
    common.print_table(rows, COLUMNS)
    for row in layers:
        print(f"\n{row['preset']}: first order against exact, along the exact run")
        common.print_table(_by_layer(row), ["layer", "outer step", "cosine", "norm ratio"])


def _measure(name: str, options: argparse.Namespace) -> Any:
    """The rows of one preset."""
    preset = presets.override(presets.get(name), num_outer_steps=options.num_outer_steps)
    if options.quick:
        changes = {"num_filters": 4, "hidden_sizes": (4,), "num_val_tasks": 5}
        preset = presets.override(preset, num_outer_steps=12, **changes)
    classes = None if options.data is None else reproduce.load(options.data)
    num_test_tasks = 20 if options.quick else options.num_test_tasks
    built = experiment.build(
        preset, seed=options.seed, num_test_tasks=num_test_tasks, data_dir=options.data_dir,
        classes=classes,
    )  # fmt: skip
    watch = _Watch(built, preset.inner_lr)
    for rate in sorted({*GRIDS[preset.dataset], preset.inner_lr}):
        for order in family.ORDERS:
            spec = Spec(f"{order}@{rate:g}", order, rate)
            is_watched = order == "exact" and rate == preset.inner_lr
            found = reproduce.train(built, spec, num_test_tasks, watch if is_watched else None)
            yield {
                "table": "run", "preset": preset.name, "order": order, "inner_lr": rate,
                "seed": options.seed, **found,
            }  # fmt: skip
    if options.plots is not None:
        from jaxmaml.train import plots  # needs matplotlib, which nothing else here does

        options.plots.mkdir(parents=True, exist_ok=True)
        # Scales and offsets of the normalisation go with their layer, and would hide it.
        layers = {layer: found for layer, found in watch.found.items() if "norm" not in layer}
        whole = layers.pop("")
        figure = plots.gradient_agreement(watch.steps, **whole, layers=layers)
        plots.save(figure, options.plots / f"{name}-agreement.png")
    yield {
        "table": "layers", "preset": name, "inner_lr": preset.inner_lr, "step": watch.steps,
        "layers": watch.found,
    }  # fmt: skip


class _Watch:
    """Both meta-gradients along a run: the probe of `training.run`."""

    def __init__(self, built: Experiment, rate: float):
        of = lambda order: experiment.learner(built, Spec(order, order, rate))
        exact, first = of("exact"), of("first")
        chunk_size = experiment.chunk_size(built.preset)

        def agreements(params, tasks):
            gradient = lambda made: jaxmaml.meta_grad(made, params, tasks, chunk_size=chunk_size)[1]
            grads, reference = gradient(first), gradient(exact)
            found = diagnostics.agreement_by_layer(grads, reference)
            return {"": diagnostics.agreement(grads, reference), **found}

        self._agreements, self._built = jax.jit(agreements), built
        self.steps: list[int] = []
        self.found: dict[str, dict[str, list[float]]] = {}

    def __call__(self, state: Any) -> None:
        step = int(state.step)
        tasks = experiment.step_tasks(self._built, step)
        for layer, pair in self._agreements(jax.device_get(state.params), tasks).items():
            lists = self.found.setdefault(layer, {"cosine": [], "norm_ratio": []})
            for values, number in zip(lists.values(), pair, strict=True):
                values.append(float(number))
        self.steps.append(step)


def _by_layer(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A few of the outer steps, for the terminal."""
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
    parser = common.parser((__doc__ or "").splitlines()[0])
    names = [name for name, preset in presets.PRESETS.items() if preset.dataset in GRIDS]
    parser.add_argument("presets", nargs="+", choices=names)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-outer-steps", type=int, help="the presets' unless told")
    parser.add_argument("--num-test-tasks", type=int, default=600)
    parser.add_argument("--data-dir", type=Path, help="prepared TFDS directory")
    parser.add_argument("--data", type=Path, help=".npz of the images, in place of --data-dir")
    parser.add_argument("--plots", type=Path, help="folder for a picture of each preset")
    return parser.parse_args()


if __name__ == "__main__":
    main()
