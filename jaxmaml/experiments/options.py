"""The options of the command line, as the dataclasses from which tyro makes them."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro

from jaxmaml.data import class_splits
from jaxmaml.experiments import presets, settings
from jaxmaml.experiments.domains import domain_of
from jaxmaml.experiments.presets import Preset

PositionalPreset = Annotated[
    str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET", help="see jaxmaml presets")
]
OptionalPreset = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="[PRESET]", help="the preset whose settings are shown", help_behavior_hint=""
    ),
]
PositionalDataset = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="NAME", help="omniglot, cifar-fs, ..., or any dataset of TFDS"),
]
OwnDataset = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="NAME",
        help="omniglot, cifar-fs, ..., any prepared dataset of TFDS, or folder:PATH",
    ),
]
DataDir = Annotated[
    pathlib.Path | None,
    tyro.conf.arg(
        metavar="DIR",
        help="prepared TFDS directory",
        help_behavior_hint="(default: $TFDS_DATA_DIR, or ~/tensorflow_datasets)",
    ),
]
RunDirectory = Annotated[
    pathlib.Path,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="RUN_DIR", help="directory that train or compare wrote"),
]
RunDirectories = Annotated[
    tuple[pathlib.Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="RUN_DIR ...",
        help="directories that train or compare wrote",
        help_behavior_hint="",
    ),
]
ReportFolder = Annotated[
    pathlib.Path | None,
    tyro.conf.arg(
        metavar="DIR",
        help="folder to write; an earlier report in it is replaced",
        help_behavior_hint="(default: RUN_DIR/report; for several directories report)",
    ),
]
OwnDataDir = Annotated[
    pathlib.Path | None,
    tyro.conf.arg(
        metavar="DIR", help="prepared TFDS directory", help_behavior_hint="(default: the run's)"
    ),
]
NumTestTasks = Annotated[int, tyro.conf.arg(help="tasks of the test")]
LearnerNames = Annotated[
    str,
    tyro.conf.arg(
        metavar="NAME,NAME,...",
        help="learners to compare, see jaxmaml train --help",
        help_behavior_hint="(default: exact and first-order MAML)",
    ),
]
InnerRates = Annotated[
    tuple[float, ...],
    tyro.conf.arg(
        metavar="FLOAT ...",
        help="inner learning rates; each learner is trained at each of them",
        help_behavior_hint="(default: the preset's)",
    ),
]
LEARNERS = (
    "maml, fomaml, maml_plus_plus, anil, boil, meta_sgd, meta_curvature, cavia, reptile, imaml, "
    "fine_tuning, unicorn, proto_maml, protonet, r2d2; for policies maml, fomaml, meta_sgd, pretrained"
)
"""The learners, for a help page: the registry itself needs JAX."""
LearnerName = Annotated[str, tyro.conf.arg(metavar="NAME", help=LEARNERS)]
Order = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="{exact,first}",
        help="order of the meta-gradient",
        help_behavior_hint="(default: exact, where a learner has both)",
    ),
]
Precision = Literal["default", "high", "highest"]

_LIKE_TRAINING = tyro.conf.arg(help_behavior_hint="(default: as in training)")

SHOWN = ("dataset", "way", "shot", "test_query", "split", "image_size", "rotate_test")
"""The settings of a preset that decide what a test episode looks like."""


_GROUPS: dict[str, str] = {
    "data": "The tasks, and their images.",
    "rollouts": "The trajectories of a policy in an environment.",
    "model": "The network.",
    "inner loop": "The adaptation to a task.",
    "outer loop": "The training over tasks.",
    "validation": "The tests during training.",
}
"""The texts of the groups of settings."""


def _settings(class_name: str, names: Iterable[str]) -> Any:
    """Returns a dataclass of the options of a preset in groups; None keeps the preset's value."""
    groups: dict[str, list[Any]] = {}
    for name in names:
        field = settings.options()[name]
        hint = tyro.conf.arg(help=field.metadata["help"], help_behavior_hint="")
        option = (name, Annotated[field.type | None, hint], None)
        groups.setdefault(field.metadata["group"], []).append(option)
    fields = []
    for group, found in groups.items():
        of_group = dataclasses.make_dataclass(
            f"{class_name}Of{group.title().replace(' ', '')}", found, frozen=True,
            namespace={"__doc__": _GROUPS[group]},
        )  # fmt: skip
        titled = Annotated[of_group, tyro.conf.arg(name=group)]
        fields.append((group.replace(" ", "_"), titled, of_group()))
    return dataclasses.make_dataclass(class_name, fields, frozen=True)


_Settings = _settings("Settings", settings.options())
_ShownSettings = _settings("ShownSettings", SHOWN)
if TYPE_CHECKING:
    Settings: TypeAlias = Any  # a type checker does not know a class that is made at run time
    ShownSettings: TypeAlias = Any
else:
    # Without a name of their own: the groups are what a help page shows.
    Settings = Annotated[_Settings, tyro.conf.arg(name="")]
    ShownSettings = Annotated[_ShownSettings, tyro.conf.arg(name="")]
UNCHANGED = _Settings()
"""The settings that keep those of the preset."""
_SHOWN_UNCHANGED = _ShownSettings()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run as a whole."""

    seed: int = 0
    """seed of the initial parameters and of the training episodes"""
    num_seeds: int = 1
    """runs of each learner, one after the other, with the seeds SEED, SEED + 1, ..."""
    num_test_tasks: int = 600
    """tasks of the final test"""
    data_dir: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(
            metavar="DIR",
            help_behavior_hint="(default: $TFDS_DATA_DIR; for glyphs the user's cache directory)",
        ),
    ] = None
    """prepared TFDS directory"""
    out: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: runs/PRESET-TIME)"),
    ] = None
    """run directory to write; one that holds the same run is continued"""
    checkpoint_every: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="INT",
            help_behavior_hint="(default: 500, or more if that took over 1 % of the time)",
        ),
    ] = None
    """outer steps between two checkpoints; ten minutes do not pass without one"""
    tensorboard: bool = False
    """also write event files for TensorBoard, into the run directory; needs jaxmaml[tensorboard]"""
    stream: bool = False
    """read images from disk during training, instead of keeping all of them on the device"""
    num_workers: int = 0
    """with --stream: processes that read and decode images (0: threads of this process)"""
    image_cache: bool = True
    """with --stream: keep decoded images in the user's cache directory"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """The devices that compute, of one machine or of many."""

    matmul_precision: Precision = "highest"
    """precision of float32 matrix products; less is faster on GPU and TPU, but not exact"""
    devices: Annotated[str, tyro.conf.arg(metavar="{all,INT}")] = "all"
    """devices of each process that compute; on a CPU its cores"""
    mesh: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="tasks=INT,model=INT", help_behavior_hint="(default: all devices for tasks)"
        ),
    ] = None
    """devices over which tasks are spread, and over which single arrays are split"""
    fully_sharded: bool = False
    """split parameters and optimizer state over the devices for tasks: each holds a part"""
    distributed: bool = False
    """join other processes that run the same command; SLURM, Open MPI and TPU pods are detected"""
    coordinator: Annotated[
        str | None, tyro.conf.arg(metavar="HOST:PORT", help_behavior_hint="(default: detected)")
    ] = None
    """with --distributed: where process 0 listens"""
    num_processes: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: detected)")
    ] = None
    """with --distributed: the number of processes"""
    process_id: Annotated[
        int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: detected)")
    ] = None
    """with --distributed: the number of this process, from 0 on"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Settings of the test that may differ from those of training."""

    way: Annotated[int | None, _LIKE_TRAINING] = None
    """classes per task; no more than in training, except for learners without a fixed head"""
    shot: Annotated[int | None, _LIKE_TRAINING] = None
    """support examples per class"""
    test_query: Annotated[int | None, _LIKE_TRAINING] = None
    """query examples per class"""
    num_test_inner_steps: Annotated[int | None, _LIKE_TRAINING] = None
    """inner steps"""
    dataset: Annotated[str | None, _LIKE_TRAINING] = None
    """another dataset, with images of the same size; of another folder, classes not seen before"""
    split: Annotated[str | None, _LIKE_TRAINING] = None
    """division of the classes"""
    image_size: Annotated[int | None, _LIKE_TRAINING] = None
    """height and width of the images in pixels"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """Files and settings of an adaptation."""

    support: Annotated[
        pathlib.Path,
        tyro.conf.arg(
            metavar="PATH",
            help="folder with one folder of pictures per class, for at most as many classes as a task "
            "of the training had; for regression a CSV of x,y",
        ),
    ]
    images: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(
            metavar="PATH", help="pictures to classify: a folder, or a file", help_behavior_hint=""
        ),
    ] = None
    points: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(
            metavar="FILE", help="for regression: CSV of x to predict", help_behavior_hint=""
        ),
    ] = None
    out: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(
            metavar="FILE",
            help="CSV to write, with a picture beside it",
            help_behavior_hint="(default: named after the run)",
        ),
    ] = None
    run: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="LABEL",
            help="the run, if the directory holds several",
            help_behavior_hint="",
        ),
    ] = None
    num_inner_steps: Annotated[
        int | None,
        tyro.conf.arg(
            metavar="INT", help="inner steps", help_behavior_hint="(default: the headline step)"
        ),
    ] = None
    statistics: Literal["support", "batch"] = "support"
    """with norm transductive: normalize by the support, or by the pictures that are classified"""
    export: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(
            metavar="DIR",
            help="directory for the adapted model, which runs without jaxmaml",
            help_behavior_hint="",
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class Show:
    """Draw one test episode of a preset."""

    preset: PositionalPreset
    out: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(
            metavar="FILE",
            help="picture to write",
            help_behavior_hint="(default: named after PRESET)",
        ),
    ] = None
    data_dir: DataDir = None
    preset_settings: ShownSettings = _SHOWN_UNCHANGED


@dataclasses.dataclass(frozen=True)
class List:
    """List the prepared datasets, with their classes and images."""

    data_dir: DataDir = None


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Download and prepare a dataset, so that it can be read without TensorFlow.

    For example:

        jaxmaml data prepare omniglot --data-dir data
    """

    dataset: PositionalDataset
    data_dir: DataDir = None
    archive_dir: Annotated[
        pathlib.Path | None,
        tyro.conf.arg(
            metavar="DIR",
            help="directory of downloaded archives; for mini-imagenet the folder of images",
            help_behavior_hint="(default: download)",
        ),
    ] = None


@dataclasses.dataclass(frozen=True)
class Split:
    """Divide the classes of a dataset at random and write a split file, for --split.

    For example, for few classes:

        jaxmaml data split folder:pets --out split.json --fractions 0.5 0.25 0.25
        jaxmaml train pictures-5w1s --dataset folder:pets --split split.json --way 2
    """

    dataset: OwnDataset
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="FILE", help="split file to write")]
    fractions: Annotated[
        tuple[float, float, float],
        tyro.conf.arg(
            metavar="FRACTION FRACTION FRACTION",
            help="fractions of the classes for train, val and test; their sum is 1",
        ),
    ] = class_splits.FRACTIONS
    seed: int = 0
    """seed of the shuffle"""
    data_dir: DataDir = None


Action = (
    Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Split, tyro.conf.subcommand("split")]
)
"""The actions of `jaxmaml data`."""


def given(preset_settings: Settings) -> dict[str, Any]:
    """Returns the settings that are not None, by name: those that a user has given."""
    groups = dataclasses.asdict(preset_settings).values()
    return {name: value for group in groups for name, value in group.items() if value is not None}


def chosen_preset(name: str, settings: Settings) -> Preset:
    """Returns the preset of a name, with the given settings.

    Raises:
        TypeError: a count is not an integer.
        ValueError: an unknown preset, or a setting outside its range.
    """
    return presets.override(presets.get(name), **given(settings))


def check_data_dir(dataset: str, data_dir: pathlib.Path | None) -> None:
    """Raises ValueError if a directory of data is given for a dataset that is not in one."""
    has_none = domain_of(dataset) != "classification" or dataset.startswith("folder:")
    if data_dir is not None and has_none:
        raise ValueError(f"data_dir has no effect on dataset={dataset!r}: leave it out")
