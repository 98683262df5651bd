"""The command line: `jaxmaml compare`, `train`, `evaluate`, `adapt`, `report`, `presets` and `data`.

Exit codes: 0 success; 1 training stopped at a loss or a gradient that is not finite; 2 a wrong
argument, or something that the user can mend, such as a full disk; 70 a bug, with its traceback; 75 or
134 another process of a training is gone; 130 interrupted by SIGINT, 143 by SIGTERM. An interrupted
training is saved first.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

from jaxmaml import files
from jaxmaml.experiments import messages, options, presets
from jaxmaml.experiments.options import List, Prepare, RunOptions, Settings, Show, Split
from jaxmaml.experiments.presets import Preset

SUCCESS, STOPPED, MISTAKE, BUG, LOST, INTERRUPTED = 0, 1, 2, 70, 75, 130
"""The exit codes; 70 and 75 are EX_SOFTWARE and EX_TEMPFAIL of sysexits.h."""
MAX_ARGUMENT = 1000
"""The most characters of an argument."""

_RUN = RunOptions()
_AS_TRAINED = options.TaskOptions()


class _UserError(Exception):
    """Something that the user can mend. Its text is all that is shown."""


def compare(
    preset: options.PositionalPreset = "glyphs-5w1s",
    *,
    learners: options.LearnerNames = "",
    inner_lrs: options.InnerRates = (),
    run: RunOptions = _RUN,
    preset_settings: Settings = options.UNCHANGED,
) -> int:
    """Train learners from the same start on the same episodes, and compare them."""
    from jaxmaml.experiments import candidates

    with _user_errors():
        chosen = options.chosen_preset(preset, preset_settings)
        names = [name.strip() for name in learners.split(",")] if learners else []
        specs = candidates.comparison(chosen, inner_lrs, names)
        _check_used(chosen, specs, preset_settings)
        if inner_lrs and preset_settings.inner_lr is not None:
            raise ValueError("inner_lr has no effect with inner_lrs: leave one of them out")
    return _execute(chosen, specs, run)


def train(
    preset: options.PositionalPreset,
    *,
    learner: options.LearnerName = "maml",
    order: options.Order = None,
    run: RunOptions = _RUN,
    preset_settings: Settings = options.UNCHANGED,
) -> int:
    """Train a learner on a preset, test it and save its state."""
    from jaxmaml.experiments import candidates

    with _user_errors():
        chosen = options.chosen_preset(preset, preset_settings)
        spec = candidates.single(chosen, learner, order)
        _check_used(chosen, [spec], preset_settings)
    return _execute(chosen, [spec], run)


def evaluate(
    run_dir: options.RunDirectory,
    *,
    num_test_tasks: options.NumTestTasks = 600,
    data_dir: options.OwnDataDir = None,
    tasks: options.TaskOptions = _AS_TRAINED,
) -> int:
    """Test the saved runs of a directory on their own tasks or on others."""
    from jaxmaml.experiments import reevaluate, tables
    from jaxmaml.experiments.progress import Display
    from jaxmaml.experiments.run_dir import RunDir

    with _user_errors():
        config = RunDir(run_dir).read_config()
        options.check_data_dir(tasks.dataset or config["preset"]["dataset"], data_dir)
    with _session(config["matmul_precision"]), Display():
        with _user_errors():
            restored = reevaluate.restore(
                run_dir,
                num_test_tasks=num_test_tasks,
                data_dir=data_dir,
                **dataclasses.asdict(tasks),
            )
        table = reevaluate.scores_table(restored, num_test_tasks)
    tables.console().print(table)
    return 0


def adapt(run_dir: options.RunDirectory, *, files: options.AdaptOptions) -> int:
    """Adapt a trained run to new classes or points, and predict."""
    _check_matplotlib()
    from jaxmaml.experiments import serving, trained
    from jaxmaml.experiments.progress import Display
    from jaxmaml.experiments.run_dir import RunDir, preset_of

    with _user_errors():
        config = RunDir(run_dir).read_config()
        request = serving.Request(
            files.support, files.images, files.points,
            files.out or serving.default_out(run_dir, files.run), files.export,
        )  # fmt: skip
        serving.check(request, preset_of(config))
    with _session(config["matmul_precision"]), _user_errors(), Display():
        served = serving.serve(
            trained.load(run_dir, files.run), request,
            num_inner_steps=files.num_inner_steps, statistics=files.statistics,
        )  # fmt: skip
        paths = serving.write(request, served)
    print(serving.report(served.adapted, paths, len(served.table) - 1))
    return SUCCESS


def report(run_dirs: options.RunDirectories, *, out: options.ReportFolder = None) -> int:
    """Write a report of runs, finished or not: a page of HTML, Markdown, pictures, a LaTeX table."""
    _check_matplotlib()
    from jaxmaml.experiments.progress import Display
    from jaxmaml.experiments.report import writing

    with _user_errors(), Display():
        page = writing.write(run_dirs, out)
    print(page)
    return SUCCESS


def list_presets() -> int:
    """List the presets, with their expected scores, costs and sources."""
    from jaxmaml.experiments import tables

    tables.console().print(tables.presets_table(presets.PRESETS.values()))
    return 0


def data(action: options.Action) -> int:
    """Show, list and prepare datasets, and divide their classes."""
    actions: dict[type, Callable[[Any], int]] = {
        Show: _show, List: _list, Prepare: _prepare, Split: _split
    }  # fmt: skip
    return actions[type(action)](action)


def _show(action: Show) -> int:
    _check_matplotlib()
    from jaxmaml.experiments.experiment import build_experiment
    from jaxmaml.experiments.figures import draw_episode
    from jaxmaml.experiments.plots import check_format
    from jaxmaml.experiments.progress import Display

    with _user_errors():
        chosen = options.chosen_preset(action.preset, action.preset_settings)
        _check_used(chosen, [], action.preset_settings)
        options.check_data_dir(chosen.dataset, action.data_dir)
        path = action.out or pathlib.Path(f"{presets.file_name(chosen)}.png")
        check_format(path)
    with _user_errors(), _session("highest"), Display():
        built = build_experiment(chosen, seed=0, data_dir=action.data_dir, num_test_tasks=1)
        draw_episode(built, path)
    print(path)
    return 0


def _list(action: List) -> int:
    from jaxmaml.data import datasets, preparation
    from jaxmaml.experiments import tables
    from jaxmaml.experiments.progress import Display

    directory = datasets.data_directory(action.data_dir)
    with _user_errors(), Display():
        found = preparation.listing(action.data_dir)
    if not found:
        print(f"nothing is prepared in {directory}")
        return 0
    tables.console().print(tables.datasets_table(found, str(directory)))
    return 0


def _prepare(action: Prepare) -> int:
    from jaxmaml.data import preparation
    from jaxmaml.experiments.progress import Display

    with _user_errors(), Display():
        directory = preparation.prepare(action.dataset, action.data_dir, action.archive_dir)
    print(directory)
    return 0


def _split(action: Split) -> int:
    from jaxmaml.data import class_splits, datasets
    from jaxmaml.experiments.progress import Display

    with _user_errors(), Display():
        options.check_data_dir(action.dataset, action.data_dir)
        names = datasets.class_names(action.dataset, action.data_dir)
        listed = class_splits.draw(names, action.fractions, action.seed)
        about = {"dataset": action.dataset, "fractions": action.fractions, "seed": action.seed}
        class_splits.write(action.out, listed, **about)
    print(f"{action.out}: " + ", ".join(f"{len(n)} {split}" for split, n in listed.items()))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a mistake in the options exits with 2 at once.

    Args:
        arguments: the words of the command line after "jaxmaml"; defaults to those of the process.
    """
    commands: dict[str, Callable[..., int]] = {
        "compare": compare,
        "train": train,
        "evaluate": evaluate,
        "adapt": adapt,
        "report": report,
        "presets": list_presets,
        "data": data,
    }
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    messages.accept_all_characters()
    if arguments == ["--version"]:
        print(f"jaxmaml {importlib.metadata.version('jaxmaml')}")
        return SUCCESS
    try:
        with messages.warnings_as_lines():
            return _run(arguments, commands)
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        return getattr(stop, "code", INTERRUPTED)
    except SystemExit as stop:
        # tyro stops at a mistake in the options, and rich with 1 at an output that is closed.
        if stop.code == STOPPED:
            return MISTAKE
        raise
    except Exception as error:
        return _report(error)


def _run(arguments: list[str], commands: dict[str, Callable[..., int]]) -> int:
    """Runs the command that the arguments name, and returns its exit code."""
    _check_lengths(arguments)
    # The command runs outside tyro, which takes a ValueError for a mistake in the options.
    command = tyro.extras.subcommand_cli_from_dict(
        {name: _deferred(command) for name, command in commands.items()},
        prog="jaxmaml",
        description="Gradient-based meta-learning in JAX.",
        args=arguments,
        config=(
            tyro.conf.CascadeSubcommandArgs,
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.DisallowNone,
        ),
    )
    code = command()
    sys.stdout.flush()
    return code


def _report(error: Exception) -> int:
    """Prints an error, and returns the exit code: a line for what the user can mend, or a bug."""
    if (lost := _lost(error)) is not None:
        print(f"error: {messages.one_line(lost)}", file=sys.stderr, flush=True)
        os._exit(LOST)  # at the end of the process, JAX would wait for the one that is gone
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        message = f"out of memory; smaller sizes or a smaller chunk_size need less ({error})"
    elif isinstance(error, _UserError | files.WriteError | files.ReadError | OSError):
        message = str(error)
    else:
        traceback.print_exception(error)
        print("This is a bug in jaxmaml: please report it.", file=sys.stderr)
        return BUG
    print(f"error: {messages.one_line(message)}", file=sys.stderr)

    # What cannot be written now cannot be written at the end of the process either.
    with contextlib.suppress(OSError, ValueError):  # an output that is not a file, or is closed
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return MISTAKE


def _lost(error: Exception) -> str | None:
    if "jax" not in sys.modules:
        return None
    from jaxmaml.experiments import joining

    return joining.lost(error)


def _check_lengths(arguments: Sequence[str]) -> None:
    for argument in arguments:
        if len(argument) > MAX_ARGUMENT:
            raise _UserError(
                f"an argument has {len(argument):,} characters, and the limit is "
                f"{MAX_ARGUMENT:,}: {argument[:60]}..."
            )


def _deferred(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    @functools.wraps(command)
    def parsed(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    return parsed


def _check_used(preset: Preset, specs: Sequence[Any], preset_settings: Settings) -> None:
    from jaxmaml.experiments import learners

    names = [spec.learner for spec in specs]
    learners.check_used(preset, options.given(preset_settings), names)


def _execute(preset: Preset, specs: Any, run: RunOptions) -> int:
    """Makes the runs of `train` or `compare`, and returns the exit code."""
    _check_matplotlib()
    if run.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise _UserError("--tensorboard needs tensorboardX: pip install 'jaxmaml[tensorboard]'")
    from jaxmaml.experiments import joining
    from jaxmaml.experiments.compare import execute, prepare, write_event_files
    from jaxmaml.experiments.interruption import interruptible
    from jaxmaml.experiments.progress import Display

    with _user_errors():
        options.check_data_dir(preset.dataset, run.data_dir)
        joining.join(run)
    name = f"{presets.file_name(preset)}-{time.strftime('%Y%m%d-%H%M%S')}"
    with _session(run.matmul_precision, run.devices), contextlib.ExitStack() as stack:
        stack.enter_context(joining.silent_but_first())
        out = joining.agreed(run.out or pathlib.Path("runs", name))
        with _user_errors(), Display.of_process():
            used = joining.chosen_devices(run, preset.num_tasks)
            comparison = stack.enter_context(prepare(
                preset, specs, out,
                seed=run.seed, num_seeds=run.num_seeds,
                num_test_tasks=run.num_test_tasks, data_dir=run.data_dir,
                streaming=_streaming(run), matmul_precision=run.matmul_precision,
                checkpoint_every=run.checkpoint_every, tensorboard=run.tensorboard, used=used,
            ))  # fmt: skip
        if comparison.is_complete:
            if run.tensorboard:
                write_event_files(comparison)
            longer = "" if preset.patience else ": a larger --num-outer-steps trains it longer"
            print(f"{out} is complete{longer}")
            return SUCCESS
        try:
            with interruptible():
                runs = execute(comparison)
        except KeyboardInterrupt:
            if comparison.run_dir.config.exists():
                print(f"the same command with --out {out} continues this run", file=sys.stderr)
            raise
        return _summarize(comparison, runs)


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
    stopped = [done for done in runs if done.stopped]
    for done in stopped:
        print(
            f"{done.label} stopped at {done.stopped}; the last good state is saved in "
            f"{comparison.run_dir.checkpoint(done.label)}",
            file=sys.stderr,
        )
    return STOPPED if stopped else SUCCESS


def _streaming(run: RunOptions) -> Any:
    """Returns how images are streamed; None if they are not."""
    from jaxmaml.experiments.tasks import Streaming

    if run.stream:
        return Streaming(run.num_workers, run.image_cache)
    if run.num_workers or not run.image_cache:
        raise ValueError("--num-workers and --no-image-cache can be used with --stream only")
    return None


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Turns the errors of a preparation into one line.

    It does not surround training: there a ValueError is a bug, and keeps its traceback, except where
    a file cannot be read or written.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise _UserError(str(error)) from None


def _check_matplotlib() -> None:
    """Raises an error for the user if matplotlib refuses its settings, before anything is drawn."""
    try:
        import matplotlib  # noqa: F401
    except ValueError as error:
        name = os.environ.get("MPLBACKEND")
        raise _UserError(f"matplotlib cannot be loaded with MPLBACKEND={name!r}: {error}") from None


@contextlib.contextmanager
def _session(matmul_precision: str, devices: str = "all") -> Iterator[None]:
    """Sets the devices, the compilation cache and the precision of matrix products."""
    import jax

    from jaxmaml.experiments import program_cache

    num_cpus = len(os.sched_getaffinity(0)) if devices == "all" else int(devices)
    # One device per core: the matrix products of one task are too small to be split over cores.
    # A program that calls `main` after it has run JAX keeps the devices that it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", num_cpus)

    program_cache.use()
    try:
        jax.devices()
    except Exception as error:  # JAX has an AssertionError without text among them
        platforms = os.environ.get("JAX_PLATFORMS")
        reason = str(error) or "there is no such backend"
        raise _UserError(f"JAX cannot start with JAX_PLATFORMS={platforms!r}: {reason}") from None
    with jax.default_matmul_precision(matmul_precision):
        yield
