"""The commands that train."""

import contextlib
import importlib.util
import pathlib
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmaml.commands.mistakes import (
    STOPPED,
    SUCCESS,
    UserError,
    check_matplotlib,
    say,
    user_errors,
)
from jaxmaml.commands.session import session
from jaxmaml.experiments import options, presets
from jaxmaml.experiments.options import DeviceOptions, RunOptions, Settings
from jaxmaml.experiments.presets import Preset

_RUN, _DEVICES = RunOptions(), DeviceOptions()


def compare(
    preset: options.PositionalPreset = "glyphs-5w1s",
    *,
    learners: options.LearnerNames = "",
    inner_lrs: options.InnerRates = (),
    run: RunOptions = _RUN,
    preset_settings: Settings = options.UNCHANGED,
    devices: DeviceOptions = _DEVICES,
) -> int:
    """Train learners from the same start on the same episodes, and compare them.

    For example:

        jaxmaml compare sinusoid-5shot
        jaxmaml compare glyphs-5w1s --learners maml,anil --num-seeds 3
        jaxmaml compare omniglot-5w1s --inner-lrs 0.1 0.4 --out runs/rates

    Options from "data" on replace settings; see `jaxmaml presets PRESET`.
    """
    from jaxmaml.experiments import candidates
    from jaxmaml.experiments import learners as registry

    with user_errors():
        chosen = options.chosen_preset(preset, preset_settings)
        names = [name.strip() for name in learners.split(",")] if learners else []
        specs = candidates.comparison(chosen, inner_lrs, names)
        given = options.given(preset_settings)
        registry.check_used(chosen, given, [spec.learner for spec in specs])
        if inner_lrs and "inner_lr" in given:
            raise ValueError("inner_lr has no effect with inner_lrs: leave one of them out")
    return _execute(chosen, specs, run, devices)


def train(
    preset: options.PositionalPreset,
    *,
    learner: options.LearnerName = "maml",
    order: options.Order = None,
    run: RunOptions = _RUN,
    preset_settings: Settings = options.UNCHANGED,
    devices: DeviceOptions = _DEVICES,
) -> int:
    """Train a learner on a preset, test it and save its state.

    For example:

        jaxmaml train glyphs-5w1s
        jaxmaml train omniglot-5w1s --order first --out runs/first
        jaxmaml train pictures-5w1s --dataset folder:my-pictures

    Options from "data" on replace settings; see `jaxmaml presets PRESET`.
    """
    from jaxmaml.experiments import candidates
    from jaxmaml.experiments import learners as registry

    with user_errors():
        chosen = options.chosen_preset(preset, preset_settings)
        spec = candidates.single(chosen, learner, order)
        registry.check_used(chosen, options.given(preset_settings), [spec.learner])
    return _execute(chosen, [spec], run, devices)


def _execute(preset: Preset, specs: Any, run: RunOptions, machine: DeviceOptions) -> int:
    """Makes the runs of `train` or `compare`, and returns the exit code."""
    check_matplotlib()
    if run.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UserError("--tensorboard needs tensorboardX: pip install 'jaxmaml[tensorboard]'")
    from jaxmaml.experiments import joining
    from jaxmaml.experiments.compare import execute, prepare, write_event_files
    from jaxmaml.experiments.interruption import interruptible
    from jaxmaml.experiments.progress import Display

    with user_errors():
        options.check_data_dir(preset.dataset, run.data_dir)
        joining.join(machine)
    with session(machine.matmul_precision, machine.devices), contextlib.ExitStack() as stack:
        stack.enter_context(joining.silent_but_first())
        out = joining.agreed(run.out or _new_directory(preset))
        with user_errors(), Display.of_process():
            used = joining.chosen_devices(machine, preset.num_tasks)
            comparison = stack.enter_context(prepare(
                preset, specs, out,
                seed=run.seed, num_seeds=run.num_seeds,
                num_test_tasks=run.num_test_tasks, data_dir=run.data_dir,
                streaming=_streaming(run), matmul_precision=machine.matmul_precision,
                checkpoint_every=run.checkpoint_every, tensorboard=run.tensorboard, used=used,
            ))  # fmt: skip
        if comparison.is_complete:
            if run.tensorboard:
                write_event_files(comparison)
            return _say_complete(comparison)
        try:
            with interruptible():
                runs = execute(comparison)
        except KeyboardInterrupt:
            if comparison.run_dir.config.exists():
                say(f"the same command with --out {out} continues this run")
            raise
        return _summarize(comparison, runs)


def _new_directory(preset: Preset) -> pathlib.Path:
    """Returns the directory of a run that names none.

    Runs that start in the same second, as those of a loop over seeds in a shell, have own ones.
    """
    when = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return pathlib.Path("runs", f"{presets.file_name(preset)}-{when}")


def _summarize(comparison: Any, runs: Sequence[Any]) -> int:
    """Says where the runs are and how they ended, and returns the exit code."""
    print(f"written to {comparison.run_dir.path}")
    for done in runs:
        if done.num_skipped:
            print(f"{done.label} left out {done.num_skipped:,} of its outer steps: not finite")
        if done.stopped_early:
            print(
                f"{done.label} stopped early at outer step {done.num_outer_steps:,}: "
                f"{comparison.experiment.preset.patience} validations without a better score"
            )
    return _say_stopped(comparison, {done.label: done.stopped for done in runs if done.stopped})


def _say_complete(comparison: Any) -> int:
    """Says that nothing is left to do, and returns the exit code with which the runs ended."""
    from jaxmaml.experiments import resuming
    from jaxmaml.experiments.compare import stopped_runs

    stopped = stopped_runs(comparison)
    can_go_on = not (stopped or resuming.reasons_against_more_steps(comparison.config))
    longer = ": a larger --num-outer-steps trains it longer" if can_go_on else ""
    print(f"{comparison.run_dir.path} is complete{longer}")
    return _say_stopped(comparison, stopped)


def _say_stopped(comparison: Any, stopped: Mapping[str, str]) -> int:
    """Says where runs stopped, by their labels, and returns the exit code."""
    for label, where in stopped.items():
        saved = comparison.run_dir.checkpoint(label)
        say(f"{label} stopped at {where}; the last good state is saved in {saved}")
    return STOPPED if stopped else SUCCESS


def _streaming(run: RunOptions) -> Any:
    """Returns how images are streamed; None if they are not."""
    from jaxmaml.experiments.tasks import Streaming

    if run.stream:
        return Streaming(run.num_workers, run.image_cache)
    if run.num_workers or not run.image_cache:
        raise ValueError("--num-workers and --no-image-cache can be used with --stream only")
    return None
