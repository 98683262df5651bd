"""The process that `time_to_accuracy.py` starts for one side and round: it trains until a target.

The clock runs from the first call of the library that trains, compilation included, and stands still
while tasks are drawn for a peer and while a validation scores the parameters. Both sides train on the
tasks of the same sampler, from the same parameters, and are scored by the same code on the same tasks.
The last line that the process prints is the row.
"""

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import jax
import runs

import jaxmaml
from jaxmaml.experiments import presets, scoring
from jaxmaml.experiments.candidates import Candidate, Spec
from jaxmaml.experiments.experiment import (
    Experiment,
    build_candidate,
    build_experiment,
    init_state,
    scored_tasks,
    step_tasks,
)
from jaxmaml.experiments.presets import Preset
from jaxmaml.types import MetaParams

OURS = "jaxmaml"
PRESET = "glyphs-5w1s"
SECONDS_BETWEEN_TURNS = 0.3
"""Threads of either library spin for up to 0.2 s after their work."""


class Clock:
    """Adds up the time of the blocks that it is entered for."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def __enter__(self) -> "Clock":
        time.sleep(SECONDS_BETWEEN_TURNS)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that the parent passes on."""
    parser.add_argument("--target", type=float, help="defaults to 0.9, or 0.25 with --quick")
    parser.add_argument("--max-steps", type=int, help="defaults to 6000, or 10 with --quick")
    parser.add_argument("--every", type=int, help="outer steps between two validations")
    parser.add_argument("--data-dir", type=Path, help="prepared TFDS directory")
    parser.add_argument("--data", type=Path, help=".npz that reproduce.py export wrote")


def main() -> None:
    """Trains the side of the command line, and prints its row."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    parser.add_argument("side")
    parser.add_argument("--quick", action=common.Quick)
    options = parser.parse_args()
    common.use_all_cores()
    experiment = _experiment(options)
    candidate = build_candidate(experiment, Spec("exact", "exact", experiment.preset.inner_lr))
    clock = Clock()
    if options.side == OURS:
        trained = _ours(experiment, candidate, clock, options.every, options.max_steps)
    else:
        trained = _theirs(experiment, options.side, clock, options.every, options.max_steps)
    print(json.dumps(_row(experiment, candidate, clock, trained, options)), flush=True)


def _experiment(options: argparse.Namespace) -> Experiment:
    changes: dict[str, Any] = {"averaging": 0.0}  # the last parameters are scored
    if options.quick:
        # A network that compiles at once.
        changes |= {"model": "mlp", "hidden_sizes": (16,), "num_tasks": 4, "num_val_tasks": 20}
    preset = presets.override(presets.get(PRESET), **changes)
    images = None if options.data is None else runs.load_images(options.data)
    return build_experiment(
        preset, seed=0, num_test_tasks=1, data_dir=options.data_dir, images=images
    )


def _row(
    experiment: Experiment,
    candidate: Candidate,
    clock: Clock,
    trained: Iterator[MetaParams],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Returns the row of a side that yields its parameters every `options.every` steps."""
    num_tasks = experiment.preset.num_val_tasks
    state, curve = init_state(experiment, candidate), []
    for number, params in enumerate(trained, start=1):
        tasks = scored_tasks(experiment, "val", num_tasks)
        score = scoring.score(candidate, state._replace(params=params), tasks, num_tasks)
        accuracy = float(score.mean[score.headline])
        steps = min(number * options.every, options.max_steps)
        curve.append([steps, clock.seconds, accuracy])
        print(*curve[-1], flush=True)
        if accuracy >= options.target:
            break
    steps, seconds, accuracy = curve[-1]
    reached = accuracy >= options.target
    missed = {} if reached else {"reason": f"not reached in {steps} steps"}
    return {
        "target": options.target, "accuracy": accuracy, "steps": steps,
        "seconds": seconds if reached else None, "first_seconds": curve[0][1],
        "num_val_tasks": num_tasks, **_settings(experiment.preset), "curve": curve, **missed,
    }  # fmt: skip


def _settings(preset: Preset) -> dict[str, Any]:
    names = ("inner_lr", "outer_lr", "num_inner_steps", "num_tasks", "num_filters")
    return {"preset": preset.name, **{name: getattr(preset, name) for name in names}}


def _ours(
    experiment: Experiment, candidate: Candidate, clock: Clock, every: int, steps: int
) -> Iterator[MetaParams]:
    """Trains with `jaxmaml.fit`, which samples its tasks itself, within the clock."""
    with clock:
        items = iter(
            jaxmaml.fit(
                candidate.learner, experiment.optimizer, init_state(experiment, candidate),
                experiment.sources["train"], steps, key=experiment.train_key,
                chunk_size=candidate.chunk_size, num_steps_per_dispatch=every,
                mesh=experiment.mesh,
            )
        )  # fmt: skip
        item = next(items, None)
    while item is not None:
        yield item[0].params
        with clock:
            item = next(items, None)


def _theirs(
    experiment: Experiment, side: str, clock: Clock, every: int, steps: int
) -> Iterator[MetaParams]:
    """Trains with a peer and PyTorch's fused Adam; its tasks are drawn outside of the clock."""
    warnings.simplefilter("ignore")  # the peers warn when they are imported
    import peer_models
    import peer_torch
    import torch

    preset, params = experiment.preset, experiment.network.params
    model = peer_models.convert(preset, "exact", params, step_tasks(experiment, 0))
    with clock:
        peer = peer_torch.PEERS[side](model)
        optimizer = torch.optim.Adam(list(peer.params.values()), lr=preset.outer_lr, fused=True)
    for start in range(0, steps, every):
        block = [step_tasks(experiment, step) for step in range(start, min(start + every, steps))]
        tensors = [
            (*peer_models.data(tasks.support, preset), *peer_models.data(tasks.query, preset))
            for tasks in block
        ]
        with clock:
            for new in tensors:
                # In place: the peer holds views of the tasks of the model.
                for held, leaf in zip((*model.support, *model.query), new, strict=True):
                    held.copy_(leaf)
                peer.run()
                optimizer.step()
            peer_models.synchronize()
        yield jax.device_put(peer_models.restore(peer.params, params, preset))


if __name__ == "__main__":
    main()
