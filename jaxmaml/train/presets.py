"""Presets: a benchmark's settings, where they come from, and what they should give.

Every field with a `help` text is an option of the command line. Inner rates are those of a MEAN
loss. Finn et al.'s code divides a sum over way*shot examples by the shot, so that its 0.4 (5-way)
and 0.1 (20-way) are both 2.0 here; it also scores as many query images a class as the shot.
"""

import dataclasses
import difflib
import math
from typing import Any, Literal

PAPER = "Finn et al. 2017, arXiv 1703.03400"
CIFAR_FS = "Bertinetto et al. 2019, arXiv 1805.08136"
FC100 = "Oreshkin et al. 2018, arXiv 1805.10123"
AVERAGING = 0.99
"""Worth 0.2 to 0.5 points on Omniglot after 5,000 to 6,000 outer steps; 0.999 lags behind."""


def _option(help: str, **kwargs: Any) -> Any:
    return dataclasses.field(metadata={"help": help}, **kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of one benchmark.

    Attributes without a help text identify and document the preset: `paper` and `table` are its
    source, `expected` the number to reproduce, `cost` how long exact MAML trains on 2 CPU cores.

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

    way: int = _option("classes per task (1 for regression)", default=5)
    shot: int = _option("support examples per class", default=1)
    query: int = _option("query examples per class in training", default=1)
    test_query: int = _option(
        "query examples per class at validation and test; with batch statistics it matters",
        default=1,
    )
    split: str = _option(
        "how classes are divided: finn or vinyals for Omniglot, a file for tfds: and folder:",
        default="",
    )
    image_size: int = _option("pixels a side (0: the data set's own)", default=0)
    rotate_train: bool = _option(
        "turn each class by a random multiple of 90 degrees in training", default=False
    )
    rotate_test: bool = _option("the same at validation and test", default=False)
    crop: int = _option("pixels by which images are moved at most in training", default=0)
    flip: bool = _option("mirror half of the images in training", default=False)
    jitter: float = _option(
        "brightness, contrast and saturation vary by this factor in training", default=0.0
    )

    model: Literal["conv", "mlp", "resnet12"] = _option("the network", default="conv")
    num_filters: int = _option(
        "filters of each convolution (conv), of the first block's (resnet12)", default=64
    )
    pooled: bool = _option("max-pooling instead of stride 2 (conv)", default=False)
    hidden_sizes: tuple[int, ...] = _option("units of each hidden layer (mlp)", default=(40, 40))
    norm: Literal["transductive", "inductive", "running", "per_step", "layer", "group", "none"] = (
        _option(
            "normalisation: by the statistics of the batch at hand, of the support, of training (also "
            "per inner step), of each example, or none",
            default="transductive",
        )
    )
    per_step_weights: bool = _option(
        "with norm per_step, scale and offset are per inner step too", default=True
    )
    norm_scale: bool = _option("the normalisation learns a scale", default=True)
    adapt_norm: bool = _option(
        "the inner loop adapts the normalisation too, not only the outer loop", default=True
    )
    head_scale: float = _option("standard deviation of the initial head", default=0.01)

    inner_lr: float = _option("inner learning rate, of a mean loss", default=0.4)
    num_inner_steps: int = _option("inner steps in training", default=1)
    num_test_inner_steps: int = _option("inner steps at validation and test", default=3)
    headline_step: int = _option("the inner step whose test score is the headline", default=3)
    outer_lr: float = _option("outer learning rate (Adam)", default=1e-3)
    outer_clip: float = _option(
        "largest entry of the meta-gradient, in size; larger ones are clipped (0: none)",
        default=0.0,
    )
    num_tasks: int = _option("tasks per outer step", default=32)
    num_outer_steps: int = _option("outer steps", default=60_000)
    chunk_size: int | Literal["auto", "all"] = _option(
        "tasks computed at once: a number, auto or all", default="auto"
    )

    outer_schedule: Literal["constant", "cosine"] = _option(
        "the outer rate stays, or falls along a cosine to a hundredth", default="constant"
    )
    averaging: float = _option(
        "decay of the moving average of the parameters that is scored (0: the last ones)",
        default=0.0,
    )
    compute_dtype: Literal["float32", "bfloat16"] = _option(
        "what the network computes in; parameters and updates stay in float32", default="float32"
    )

    num_validations: int = _option("validations during training", default=6)
    num_val_tasks: int = _option("tasks of each validation", default=100)
    selection_steps: tuple[int, ...] = _option(
        "inner steps over which validation selects the parameters (none: the last ones)", default=()
    )

    @property
    def is_regression(self) -> bool:
        """Whether tasks are scored by mean squared error rather than accuracy."""
        return self.dataset == "sinusoid"


def options() -> dict[str, dataclasses.Field[Any]]:
    """The fields that are options of the command line, by name."""
    return {f.name: f for f in dataclasses.fields(Preset) if "help" in f.metadata}


def get(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ValueError: there is none; the message suggests the nearest name.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
    raise ValueError(
        f"unknown preset {name!r}: did you mean {near[0]!r}? "
        f"The presets are {', '.join(PRESETS)} (jaxmaml presets describes them)"
    )


def override(preset: Preset, **changes: Any) -> Preset:
    """`preset` with the changes that are not None, checked.

    The headline step follows a smaller number of test steps unless it is given too, and so do the
    steps that select the parameters.

    Raises:
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
    at_least_one = (
        *("way", "shot", "query", "test_query", "num_tasks", "num_outer_steps"),
        *("num_filters", "num_val_tasks"),
    )
    for name in at_least_one:
        _require(getattr(preset, name) >= 1, preset, name, "must be at least 1")
    not_negative = (
        *("num_inner_steps", "num_test_inner_steps", "num_validations", "head_scale"),
        *("image_size", "crop", "jitter", "outer_clip"),
    )
    for name in not_negative:
        _require(getattr(preset, name) >= 0, preset, name, "must not be negative")
    for name in ("inner_lr", "outer_lr", "head_scale"):
        _require(math.isfinite(getattr(preset, name)), preset, name, "must be finite")
    _require(0 <= preset.averaging < 1, preset, "averaging", "must be at least 0 and below 1")
    last = preset.num_test_inner_steps
    within = f"must be between 0 and num_test_inner_steps={last}"
    _require(0 <= preset.headline_step <= last, preset, "headline_step", within)
    _require(all(0 <= i <= last for i in preset.selection_steps), preset, "selection_steps", within)
    chunk_ok = preset.chunk_size in ("auto", "all") or (
        isinstance(preset.chunk_size, int) and preset.chunk_size >= 1
    )
    _require(chunk_ok, preset, "chunk_size", "must be at least 1, 'auto' or 'all'")
    if preset.is_regression:
        _require(preset.way == 1, preset, "way", "must be 1 for regression")


def _require(holds: bool, preset: Preset, name: str, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name} {rule}, got {getattr(preset, name)!r}")


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
        # Without batch statistics more query points only make the estimate steadier.
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
        # One to ten steps improve until about 30,000 outer steps, then five steps get worse again.
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
    """The settings of learn2learn's runs of Conv4 (5-shot); for 1-shot the same, with 15 query."""
    is_fs = dataset == "cifar-fs"
    query = shot if shot == 5 else 15
    num_steps = 1 if is_fs else 5
    return Preset(
        name=f"{dataset}-5w{shot}s",
        dataset=dataset,
        paper=paper,
        table="learn2learn 0.2, examples/vision/maml",
        expected=expected,
        cost=("2.5 days" if shot == 1 else "1.5 days") + ", estimated",
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
    """84x84: the MAML paper's settings for miniImageNet."""
    return Preset(
        name=f"{dataset}-5w{shot}s",
        dataset=dataset,
        paper=PAPER if dataset == "mini-imagenet" else "Chen et al. 2019, arXiv 1904.04232",
        table="table 1",
        expected=expected,
        cost="4 days, estimated",
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
        _glyphs(
            *(5, 1, "86.6 % exact, 77.7 % first order"),
            "2 min",
        ),
        _glyphs(5, 5, "no published number", "8 min, estimated"),
        _glyphs(20, 1, "no published number", "4 min, estimated"),
        _omniglot(5, 1, "98.7 ± 0.4 %", "1.5 h, estimated"),
        _omniglot(5, 5, "99.9 ± 0.1 %", "7 h, estimated"),
        _omniglot(20, 1, "95.8 ± 0.3 %", "12 h, estimated"),
        _omniglot(20, 5, "98.9 ± 0.2 %", "2.5 days, estimated"),
        _omniglot(5, 1, "89.7 ± 1.1 %", "1 h, estimated", mlp=True),
        _omniglot(5, 5, "97.5 ± 0.6 %", "2 h, estimated", mlp=True),
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
