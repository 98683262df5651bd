"""Presets: the settings of a benchmark, their source, and the number they should reproduce.

Every field with a `help` text is an option of the command line. Inner learning rates belong to a
MEAN loss. The code of Finn et al. divides a sum over way * shot examples by the shot, so its rates
0.4 (5-way) and 0.1 (20-way) are both 2.0 here. It also scores as many query images per class as
there are support images.
"""

import dataclasses
import difflib
import math
from typing import Any, Literal

from jaxmaml.checks import check_count

PAPER = "Finn et al. 2017, arXiv 1703.03400"
CIFAR_FS = "Bertinetto et al. 2019, arXiv 1805.08136"
FC100 = "Oreshkin et al. 2018, arXiv 1805.10123"
AVERAGING = 0.99
"""Adds 0.2 to 0.5 points on Omniglot after 5,000 to 6,000 outer steps; 0.999 lags behind."""


def _option(help: str, **kwargs: Any) -> Any:
    """Returns a dataclass field that is an option of the command line."""
    return dataclasses.field(metadata={"help": help}, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of one benchmark.

    The attributes without a help text identify and document the preset: `paper` and `table` name
    its source, `expected` is the number to reproduce, and `cost` is the time that training exact
    MAML takes on two CPU cores ("est." marks an estimate).

    >>> get("glyphs-5w1s").inner_lr
    0.4
    """

    name: str
    dataset: str = _option(
        "sinusoid, glyphs, omniglot, cifar-fs, fc100, cub, mini-imagenet, tfds:NAME or folder:PATH"
    )
    paper: str
    table: str
    expected: str
    cost: str

    # Tasks.
    way: int = _option("classes per task (1 for regression)", default=5)
    shot: int = _option("support examples per class", default=1)
    query: int = _option("query examples per class in training", default=1)
    test_query: int = _option(
        "query examples per class in validation and test; affects batch statistics",
        default=1,
    )
    split: str = _option(
        "division of the classes: finn or vinyals for omniglot, a file for tfds: and folder:",
        default="",
    )
    image_size: int = _option(
        "height and width of the images in pixels (0: as in the dataset)", default=0
    )
    rotate_train: bool = _option(
        "rotate each class by a random multiple of 90 degrees in training", default=False
    )
    rotate_test: bool = _option(
        "rotate each class by a random multiple of 90 degrees in validation and test",
        default=False,
    )
    crop: int = _option("largest random shift of a training image, in pixels", default=0)
    flip: bool = _option("mirror half of the training images", default=False)
    jitter: float = _option(
        "largest relative change of brightness, contrast and saturation of a training image",
        default=0.0,
    )

    # Network.
    model: Literal["conv", "mlp", "resnet12"] = _option("the network", default="conv")
    num_filters: int = _option(
        "filters of each convolution (conv) or of the first block (resnet12)", default=64
    )
    pooled: bool = _option("max-pooling instead of stride 2 (conv)", default=False)
    hidden_sizes: tuple[int, ...] = _option("units of each hidden layer (mlp)", default=(40, 40))
    norm: Literal["transductive", "inductive", "running", "per_step", "layer", "group", "none"] = (
        _option(
            "statistics of the normalization: of the batch (transductive), of the support "
            "(inductive), accumulated in training (running), the same per inner step (per_step), "
            "of each example (layer, group), or no normalization",
            default="transductive",
        )
    )
    per_step_weights: bool = _option(
        "with norm per_step: learn a scale and an offset per inner step too", default=True
    )
    norm_scale: bool = _option("learn a scale in the normalization", default=True)
    adapt_norm: bool = _option(
        "adapt the normalization in the inner loop, not only in the outer loop", default=True
    )
    head_scale: float = _option("standard deviation of the initial head", default=0.01)

    # Training.
    inner_lr: float = _option("inner learning rate, for a mean loss", default=0.4)
    num_inner_steps: int = _option("inner steps in training", default=1)
    num_test_inner_steps: int = _option("inner steps in validation and test", default=3)
    headline_step: int = _option("inner step whose test score is the headline", default=3)
    outer_lr: float = _option("outer learning rate (Adam)", default=1e-3)
    outer_clip: float = _option(
        "clip each entry of the meta-gradient to this magnitude (0: no clipping)", default=0.0
    )
    num_tasks: int = _option("tasks per outer step", default=32)
    num_outer_steps: int = _option("outer steps", default=60_000)
    chunk_size: int | Literal["auto", "all"] = _option(
        "tasks computed at once: a number, auto or all", default="auto"
    )
    outer_schedule: Literal["constant", "cosine"] = _option(
        "schedule of the outer learning rate; cosine ends at one hundredth", default="constant"
    )
    averaging: float = _option(
        "decay of the moving average of the parameters, which is scored (0: no average)",
        default=0.0,
    )
    compute_dtype: Literal["float32", "bfloat16"] = _option(
        "dtype of the network's computation; parameters and updates stay in float32",
        default="float32",
    )

    # Validation.
    num_validations: int = _option("validations during training", default=6)
    num_val_tasks: int = _option("tasks per validation", default=100)
    selection_steps: tuple[int, ...] = _option(
        "inner steps whose validation scores select the parameters (none: keep the last ones)",
        default=(),
    )

    @property
    def is_regression(self) -> bool:
        """Whether tasks are scored by mean squared error instead of accuracy."""
        return self.dataset == "sinusoid"

    @property
    def metric(self) -> str:
        """The name of the score, as in the axis label of a plot."""
        return "MSE" if self.is_regression else "accuracy"

    @property
    def core_chunk_size(self) -> int | Literal["auto"] | None:
        """The chunk size as `jaxmaml.meta_grad` takes it: None for all tasks."""
        return None if self.chunk_size == "all" else self.chunk_size


def options() -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields that are options of the command line, by name."""
    return {f.name: f for f in dataclasses.fields(Preset) if "help" in f.metadata}


def get(name: str) -> Preset:
    """Returns the preset of a name.

    Raises:
        ValueError: no preset has this name; the message suggests the nearest one.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
    raise ValueError(
        f"unknown preset {name!r}: did you mean {near[0]!r}? "
        f"The presets are {', '.join(PRESETS)} (jaxmaml presets describes them)"
    )


def override(preset: Preset, **changes: Any) -> Preset:
    """Returns a preset with the changes that are not None.

    With fewer test steps, the headline step and the selection steps are reduced to fit, unless they
    are given too.

    Args:
        preset: the preset to change.
        changes: new values of its fields; None keeps a value.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a setting is outside its range.

    >>> override(get("glyphs-5w1s"), way=None, num_test_inner_steps=2).headline_step
    2
    """
    given = {name: value for name, value in changes.items() if value is not None}
    last = given.get("num_test_inner_steps", preset.num_test_inner_steps)
    given.setdefault("headline_step", min(preset.headline_step, last))
    given.setdefault("selection_steps", tuple(i for i in preset.selection_steps if i <= last))
    changed = dataclasses.replace(preset, **given)
    _check(changed)
    return changed


def _check(preset: Preset) -> None:
    """Raises an error unless every setting is within its range."""
    # Counts.
    positive = (
        *("way", "shot", "query", "test_query", "num_tasks", "num_outer_steps"),
        *("num_filters", "num_val_tasks"),
    )
    for name in positive:
        check_count(name, getattr(preset, name))
    for name in ("num_inner_steps", "num_test_inner_steps", "num_validations", "image_size"):
        check_count(name, getattr(preset, name), minimum=0)
    chunk_size = preset.chunk_size
    chunk_ok = chunk_size in ("auto", "all") or (isinstance(chunk_size, int) and chunk_size >= 1)
    _require(chunk_ok, preset, "chunk_size", "must be at least 1, 'auto' or 'all'")
    if preset.is_regression:
        _require(preset.way == 1, preset, "way", "must be 1 for regression")

    # Real numbers.
    for name in ("crop", "jitter", "outer_clip", "head_scale"):
        _require(getattr(preset, name) >= 0, preset, name, "must not be negative")
    for name in ("inner_lr", "outer_lr", "head_scale"):
        _require(math.isfinite(getattr(preset, name)), preset, name, "must be finite")
    _require(0 <= preset.averaging < 1, preset, "averaging", "must be at least 0 and below 1")

    # Inner steps that are scored.
    last = preset.num_test_inner_steps
    within = f"must be between 0 and num_test_inner_steps={last}"
    _require(0 <= preset.headline_step <= last, preset, "headline_step", within)
    _require(all(0 <= i <= last for i in preset.selection_steps), preset, "selection_steps", within)


def _require(holds: bool, preset: Preset, name: str, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} {rule}; got {getattr(preset, name)!r}")


def _sinusoid(shot: int, expected: str) -> Preset:
    return Preset(
        name=f"sinusoid-{shot}shot",
        dataset="sinusoid",
        paper=PAPER,
        table="section 5.1",
        expected=expected,
        cost="1 min",
        way=1,
        shot=shot,
        query=shot,
        # There are no batch statistics: more query points only reduce the variance of the score.
        test_query=100,
        model="mlp",
        hidden_sizes=(40, 40),
        norm="none",
        inner_lr=0.01,
        num_test_inner_steps=10,
        headline_step=10,
        num_tasks=25,
        num_outer_steps=30_000,
        chunk_size="all",
        # The scores after 1 to 10 inner steps improve up to about 30,000 outer steps; then the score
        # after 5 inner steps gets worse.
        num_validations=30,
        num_val_tasks=1000,
        selection_steps=(1, 5, 10),
    )


def _glyphs(way: int, shot: int, expected: str, cost: str) -> Preset:
    return Preset(
        name=f"glyphs-{way}w{shot}s",
        dataset="glyphs",
        paper="synthetic: letters of matplotlib's fonts",
        table="measured here",
        expected=expected,
        cost=cost,
        way=way,
        shot=shot,
        query=shot,
        test_query=5,
        split="script",
        outer_lr=3e-3,
        num_tasks=32 if way == 5 else 16,
        averaging=AVERAGING,
        num_outer_steps=600,
    )


def _omniglot(way: int, shot: int, expected: str, cost: str, *, mlp: bool = False) -> Preset:
    num_test_steps = 3 if way == 5 else 5
    return Preset(
        name=f"omniglot-{'mlp-' * mlp}{way}w{shot}s",
        dataset="omniglot",
        paper=PAPER,
        table="table 1",
        expected=expected,
        cost=cost,
        way=way,
        shot=shot,
        query=shot,
        test_query=shot,
        split="finn",
        rotate_train=True,
        rotate_test=True,
        model="mlp" if mlp else "conv",
        hidden_sizes=(256, 128, 64, 64),
        norm_scale=False,
        adapt_norm=False,
        head_scale=0.01 if mlp else 1.0,
        inner_lr=2.0,
        num_inner_steps=1 if way == 5 else 5,
        num_test_inner_steps=num_test_steps,
        headline_step=num_test_steps,
        num_tasks=32 if way == 5 else 16,
        averaging=AVERAGING,
    )


def _cifar(dataset: str, paper: str, shot: int, expected: str) -> Preset:
    """Returns the settings of learn2learn's Conv4 runs (5-shot); 1-shot differs in 15 query."""
    is_fs = dataset == "cifar-fs"
    query = shot if shot == 5 else 15
    num_steps = 1 if is_fs else 5
    return Preset(
        name=f"{dataset}-5w{shot}s",
        dataset=dataset,
        paper=paper,
        table="learn2learn 0.2, examples/vision/maml",
        expected=expected,
        cost="est. 2.5 days" if shot == 1 else "est. 1.5 days",
        shot=shot,
        query=query,
        test_query=query,
        pooled=True,
        inner_lr=0.5 if is_fs else 0.1,
        num_inner_steps=num_steps,
        num_test_inner_steps=num_steps,
        headline_step=num_steps,
        outer_lr=3e-3 if is_fs else 1e-3,
        averaging=AVERAGING,
    )


def _large(dataset: str, shot: int, expected: str) -> Preset:
    """Returns the MAML paper's settings for miniImageNet, for images of 84x84 pixels."""
    return Preset(
        name=f"{dataset}-5w{shot}s",
        dataset=dataset,
        paper=PAPER if dataset == "mini-imagenet" else "Chen et al. 2019, arXiv 1904.04232",
        table="table 1",
        expected=expected,
        cost="est. 4 days",
        shot=shot,
        query=15,
        test_query=15,
        pooled=True,
        num_filters=32,
        inner_lr=0.05,
        num_inner_steps=5,
        num_test_inner_steps=10,
        headline_step=10,
        num_tasks=4 if shot == 1 else 2,
        outer_clip=10.0,
        averaging=AVERAGING,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _sinusoid(5, "MSE 0.67 / 0.38 / 0.35 after 1 / 5 / 10 steps"),
        _sinusoid(10, "no published number"),
        _glyphs(5, 1, "86.6 % exact, 77.7 % first order", "2 min"),
        _glyphs(5, 5, "no published number", "est. 8 min"),
        _glyphs(20, 1, "no published number", "est. 4 min"),
        _omniglot(5, 1, "98.7 ± 0.4 %", "est. 1.5 h"),
        _omniglot(5, 5, "99.9 ± 0.1 %", "est. 7 h"),
        _omniglot(20, 1, "95.8 ± 0.3 %", "est. 12 h"),
        _omniglot(20, 5, "98.9 ± 0.2 %", "est. 2.5 days"),
        _omniglot(5, 1, "89.7 ± 1.1 %", "est. 1 h", mlp=True),
        _omniglot(5, 5, "97.5 ± 0.6 %", "est. 2 h", mlp=True),
        _cifar("cifar-fs", CIFAR_FS, 1, "58.9 ± 1.9 %"),
        _cifar("cifar-fs", CIFAR_FS, 5, "73.6 % (learn2learn), 71.5 ± 1.0 %"),
        _cifar("fc100", FC100, 1, "no published number"),
        _cifar("fc100", FC100, 5, "49.0 % (learn2learn)"),
        _large("mini-imagenet", 1, "48.70 ± 1.84 %"),
        _large("mini-imagenet", 5, "63.11 ± 0.92 %"),
        _large("cub", 1, "about 55 %, in surveys"),
        _large("cub", 5, "72 to 76 %, in surveys"),
    )
}
"""Every preset, by name."""
