"""The command line: `jaxmaml compare`, `train`, `evaluate`, `presets` and `data`.

Exit codes: 0 success; 1 a loss or gradient that is not finite stopped training; 2 a wrong argument;
130 interrupted.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro

from jaxmaml.train import presets
from jaxmaml.train.presets import Preset

PositionalPreset = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET", help="see jaxmaml presets")
]
PositionalDataset = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="NAME", help="omniglot, cifar-fs, ..., or any name of TFDS"),
]
DataDir = Annotated[
    pathlib.Path | None,
    tyro.conf.arg(
        metavar="DIR", help="TFDS directory", help_behavior_hint="(default: $TFDS_DATA_DIR)"
    ),
]
Precision = Literal["default", "high", "highest"]

_LIKE_TRAINING = tyro.conf.arg(help_behavior_hint="(default: the run's)")

_Settings = dataclasses.make_dataclass(
    "Settings",
    [
        (
            name,
            Annotated[
                field.type | None,
                tyro.conf.arg(help=field.metadata["help"], help_behavior_hint=""),
            ],
            None,
        )
        for name, field in presets.options().items()
    ],
    frozen=True,
    namespace={"__doc__": "Each replaces the preset's own value."},
)
"""Every option of a preset, None where the preset's value stands."""
if TYPE_CHECKING:
    Settings: TypeAlias = Any  # a type checker knows no class that is made
else:
    Settings = _Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Options of a command that trains."""

    seed: int = 0
    """Seed of the initial parameters and of the training episodes."""
    num_test_tasks: int = 600
    """Tasks of the final test."""
    data_dir: Annotated[pathlib.Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Prepared TFDS directory (glyphs: the user's cache directory, filled when first used)."""
    out: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/PRESET-TIME)"),
    ] = None
    """Directory that is written; it must not hold another run."""
    stream: bool = False
    """Read images from disk as they are needed, instead of keeping all on the device."""
    num_workers: int = 0
    """With --stream: processes that read and decode (0: threads of this one)."""
    image_cache: bool = True
    """With --stream: keep decoded images in the user's cache directory."""
    matmul_precision: Precision = "highest"
    """Of float32 matrix products: less than highest is faster on GPU and TPU, and not exact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
    """What may differ between training and a test; unless told, nothing does."""

    way: Annotated[int | None, _LIKE_TRAINING] = None
    """Classes per task: no more than the head has, but for learners without a fixed one."""
    shot: Annotated[int | None, _LIKE_TRAINING] = None
    """Support examples per class."""
    test_query: Annotated[int | None, _LIKE_TRAINING] = None
    """Query examples per class."""
    num_test_inner_steps: Annotated[int | None, _LIKE_TRAINING] = None
    """Inner steps."""
    dataset: Annotated[str | None, _LIKE_TRAINING] = None
    """Another data set, with images of the same size."""
    split: Annotated[str | None, _LIKE_TRAINING] = None
    """How its classes are divided."""
    image_size: Annotated[int | None, _LIKE_TRAINING] = None
    """Pixels a side."""


_RUN = Run()
_AS_TRAINED = Tasks()
_UNCHANGED = _Settings()


class _UserError(Exception):
    """What the user can put right; its text is all that is shown."""


def compare(
    preset: PositionalPreset = "glyphs-5w1s",
    *,
    learners: Annotated[
        str,
        tyro.conf.arg(
            metavar="NAME,NAME,...",
            help="what is compared: maml, fomaml, anil, reptile, imaml, protonet, ...",
            help_behavior_hint="(default: exact and first-order MAML)",
        ),
    ] = "",
    inner_lrs: Annotated[
        tuple[float, ...],
        tyro.conf.arg(
            metavar="FLOAT ...",
            help="train each at each of these inner rates",
            help_behavior_hint="(default: the preset's)",
        ),
    ] = (),
    run: Run = _RUN,
    preset_settings: Settings = _UNCHANGED,
) -> int:
    """Train learners from the same start on the same episodes, and compare them."""
    from jaxmaml.train import compare as comparison

    with _user_errors():
        chosen = presets.override(presets.get(preset), **dataclasses.asdict(preset_settings))
        names = [name.strip() for name in learners.split(",")] if learners else []
        specs = comparison.specs_of(chosen.inner_lr, inner_lrs, names)
    return _execute(chosen, specs, run)


def train(
    preset: PositionalPreset,
    *,
    learner: Annotated[
        str, tyro.conf.arg(metavar="NAME", help="maml, anil, meta_sgd, reptile, protonet, ...")
    ] = "maml",
    order: Annotated[
        str, tyro.conf.arg(metavar="{exact,first}", help="order of the meta-gradient")
    ] = "exact",
    run: Run = _RUN,
    preset_settings: Settings = _UNCHANGED,
) -> int:
    """Train a learner on a preset, test it and save its state."""
    from jaxmaml.train import family
    from jaxmaml.train.experiment import Spec

    with _user_errors():
        chosen = presets.override(presets.get(preset), **dataclasses.asdict(preset_settings))
        name, own_order = family.resolve(learner)
        order = order if own_order == "exact" else own_order
        label = order if learner == "maml" else learner
    return _execute(chosen, [Spec(label, order, chosen.inner_lr, name)], run)


def evaluate(
    run_dir: Annotated[
        pathlib.Path,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="RUN_DIR", help="what train or compare wrote"),
    ],
    *,
    num_test_tasks: Annotated[int, tyro.conf.arg(help="tasks of the test")] = 600,
    data_dir: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(
            metavar="DIR", help="prepared TFDS directory", help_behavior_hint="(default: the run's)"
        ),
    ] = None,
    tasks: Tasks = _AS_TRAINED,
) -> int:
    """Test the saved parameters of a run, on tasks like those of its training or on others."""
    from jaxmaml.train import evaluation, logging, report

    with _user_errors():
        config = logging.read_config(run_dir)
    with _session(config["matmul_precision"]):
        with _user_errors():
            changes = dataclasses.asdict(tasks)
            restored = evaluation.restore(run_dir, config, data_dir, num_test_tasks, **changes)
        table = evaluation.table(restored, num_test_tasks)
    report.console().print(table)
    return 0


def list_presets() -> int:
    """List the presets: what each should give, what it costs, where it comes from."""
    from jaxmaml.train import report

    report.console().print(report.presets_table(presets.PRESETS.values()))
    return 0


@dataclasses.dataclass(frozen=True)
class Show:
    """Draw one test episode of a preset."""

    preset: PositionalPreset
    out: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(
            metavar="FILE", help="picture to write", help_behavior_hint="(default: PRESET.png)"
        ),
    ] = None
    data_dir: DataDir = None
    preset_settings: Settings = _UNCHANGED


@dataclasses.dataclass(frozen=True)
class List:
    """List the data sets that are prepared: where, how many classes and images."""

    data_dir: DataDir = None


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Download and prepare a data set, for reading without TensorFlow."""

    dataset: PositionalDataset
    data_dir: DataDir = None
    archive_dir: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(
            metavar="DIR",
            help="archives downloaded before; for mini-imagenet the folder of images",
            help_behavior_hint="(default: download)",
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class Split:
    """Divide the classes of a data set at random, once, into a file that a preset's split names."""

    dataset: PositionalDataset
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE", help="file to write")]
    fractions: Annotated[
        tuple[float, float, float],
        tyro.conf.arg(metavar="TRAIN VAL TEST", help="shares of the classes; they add up to 1"),
    ] = (0.64, 0.16, 0.2)
    seed: int = 0
    """Seed of the shuffle."""
    data_dir: DataDir = None


def data(
    action: Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Split, tyro.conf.subcommand("split")],
) -> int:
    """Look at data, prepare it, divide its classes."""
    actions: dict[type, Callable[[Any], int]] = {
        Show: _show, List: _list, Prepare: _prepare, Split: _split
    }  # fmt: skip
    return actions[type(action)](action)


def _show(action: Show) -> int:
    from jaxmaml.train import experiment, pictures

    with _user_errors(), _session("highest"):
        settings = dataclasses.asdict(action.preset_settings)
        chosen = presets.override(presets.get(action.preset), **settings)
        path = action.out or pathlib.Path(f"{action.preset}.png")
        built = experiment.build(chosen, seed=0, data_dir=action.data_dir, num_test_tasks=1)
        pictures.draw_episode(built, path)
    print(path)
    return 0


def _list(action: List) -> int:
    from jaxmaml.data import datasets, preparation
    from jaxmaml.train import report

    directory = datasets.data_directory(action.data_dir)
    with _user_errors():
        found = preparation.listing(action.data_dir)
    if not found:
        print(f"nothing is prepared in {directory}")
        return 0
    report.console().print(report.datasets_table(found, str(directory)))
    return 0


def _prepare(action: Prepare) -> int:
    from jaxmaml.data import preparation

    with _user_errors():
        print(preparation.prepare(action.dataset, action.data_dir, action.archive_dir))
    return 0


def _split(action: Split) -> int:
    from jaxmaml.data import class_splits, datasets

    with _user_errors():
        names = datasets.class_names(action.dataset, action.data_dir)
        listed = class_splits.draw(names, action.fractions, action.seed)
        about = {"dataset": action.dataset, "fractions": action.fractions, "seed": action.seed}
        class_splits.write(action.out, listed, **about)
    print(f"{action.out}: " + ", ".join(f"{len(n)} {part}" for part, n in listed.items()))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a mistake in the options exits with 2 at once."""
    commands: dict[str, Callable[..., int]] = {
        "compare": compare,
        "train": train,
        "evaluate": evaluate,
        "presets": list_presets,
        "data": data,
    }
    # Run outside tyro, which takes a ValueError for a mistake in the options.
    later = {name: _deferred(command) for name, command in commands.items()}
    try:
        command = tyro.extras.subcommand_cli_from_dict(
            later,
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
        return command()
    except _UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _deferred(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    @functools.wraps(command)
    def parsed(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    return parsed


def _streaming(run: Run) -> Any:
    """How images are streamed; None where they are not, which leaves nothing to be said of it."""
    from jaxmaml.train import experiment

    if run.stream:
        return experiment.Streaming(run.num_workers, run.image_cache)
    if run.num_workers or not run.image_cache:
        raise ValueError("num_workers and image_cache have a meaning with --stream only")
    return None


def _execute(preset: Preset, specs: Any, run: Run) -> int:
    from jaxmaml.train import compare as comparison
    from jaxmaml.train import experiment, family, logging, results

    out = run.out or pathlib.Path("runs", f"{preset.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    with _session(run.matmul_precision):
        with _user_errors():
            logging.check_vacant(out)
            built = experiment.build(
                preset,
                seed=run.seed,
                data_dir=run.data_dir,
                num_test_tasks=run.num_test_tasks,
                streaming=_streaming(run),
                with_classes=any(
                    family.needs_class_numbers(preset, spec.learner) for spec in specs
                ),
            )
            for spec in specs:
                family.check(experiment.parts(built), spec.learner, spec.order)
            config = results.config(
                preset,
                specs,
                seed=run.seed,
                num_test_tasks=run.num_test_tasks,
                data_dir=run.data_dir,
                matmul_precision=run.matmul_precision,
                input_shape=experiment.input_shape(built.sources["train"]),
                num_classes=built.num_classes,
            )
            comparison.open_run(out, config)
        runs = comparison.execute(built, specs, config, out)
    print(f"written to {out}")
    for stopped in (done for done in runs if done.stopped):
        print(
            f"{stopped.spec.label} stopped at {stopped.stopped}; the last good state is saved in "
            f"{comparison.checkpoint_path(out, stopped.spec.label)}",
            file=sys.stderr,
        )
    return 1 if any(done.stopped for done in runs) else 0


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Turns what building an experiment refuses into one line.

    Only round the preparation: a ValueError while training is a bug, and keeps its traceback.
    """
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise _UserError(" ".join(str(error).split())) from None


@contextlib.contextmanager
def _session(matmul_precision: str) -> Iterator[None]:
    """The precision of matrix products, and programs compiled once for all runs."""
    import jax
    import platformdirs

    # One device a core: the matrix products of one task are too small to be split between cores.
    # A program that calls `main` and runs JAX already keeps the devices it has.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = pathlib.Path(platformdirs.user_cache_dir("jaxmaml"), "compilation")
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    with jax.default_matmul_precision(matmul_precision):
        yield
