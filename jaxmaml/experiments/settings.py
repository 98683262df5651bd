"""The settings of a benchmark: what each of them means, and when it has an effect.

Every field with a `help` text is an option of the command line.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from jaxmaml.experiments.domains import ENVIRONMENTS, METRICS, Domain, Metric, domain_of

Group: TypeAlias = Literal["data", "rollouts", "model", "inner loop", "outer loop", "validation"]
"""The settings that belong together."""
Condition: TypeAlias = Callable[["Preset"], str]
"""Returns the other setting because of which a setting has no effect; "" if it has one."""
DOCUMENTATION = ("paper", "table", "expected", "cost")
"""The fields of a preset that say where it is from and what to expect. They decide nothing."""


def _option(group: Group, help: str, *, where: Condition | None = None, **kwargs: Any) -> Any:
    """Returns a dataclass field that is an option of the command line.

    Args:
        group: the options among which a help page lists it.
        help: the text of the option.
        where: when the setting has an effect; defaults to always.
        **kwargs: arguments of `dataclasses.field`.
    """
    metadata = {"group": group, "help": help, "where": where or (lambda _: "")}
    return dataclasses.field(metadata=metadata, **kwargs)


_data = functools.partial(_option, "data")
_rollouts = functools.partial(_option, "rollouts")
_model = functools.partial(_option, "model")
_inner = functools.partial(_option, "inner loop")
_outer = functools.partial(_option, "outer loop")
_validation = functools.partial(_option, "validation")


def _in(*domains: Domain) -> Condition:
    return lambda preset: "" if preset.domain in domains else f"dataset={preset.dataset!r}"


_on_images = _in("classification")
_on_examples = _in("classification", "regression")
_in_environments = _in("reinforcement")


def _all(*conditions: Condition) -> Condition:
    return lambda preset: next(filter(None, (found(preset) for found in conditions)), "")


def _with_outer(*names: str) -> Condition:
    return lambda preset: "" if preset.outer in names else f"outer={preset.outer!r}"


def _in_models(*models: str) -> Condition:
    is_one = lambda preset: "" if preset.model in models else f"model={preset.model!r}"
    return _all(_on_examples, is_one)


def _in_hidden_layers(preset: "Preset") -> str:
    is_policy = preset.domain == "reinforcement"
    return "" if is_policy else _in_models("mlp")(preset)


def _with_hidden_layers(preset: "Preset") -> str:
    is_linear = preset.model == "mlp" and not preset.hidden_sizes
    return _on_examples(preset) or ("hidden_sizes=()" if is_linear else "")


def _normalized(preset: "Preset") -> str:
    return _with_hidden_layers(preset) or ("norm='none'" if preset.norm == "none" else "")


def _normalized_per_step(preset: "Preset") -> str:
    is_per_step = preset.norm == "per_step"
    return _with_hidden_layers(preset) if is_per_step else f"norm={preset.norm!r}"


def _validated(preset: "Preset") -> str:
    return "" if preset.num_validations else "num_validations=0"


def _selected(preset: "Preset") -> str:
    return _validated(preset) or ("" if preset.selection_steps else "selection_steps=()")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings of one benchmark.

    The attributes without a help text identify and document the preset: `paper` and `table` name
    its source, `expected` is the number to reproduce, and `cost` is the time that training exact
    MAML takes on two CPU cores ("est." marks an estimate).

    >>> Preset(name="mine", dataset="omniglot", paper="", table="", expected="", cost="").way
    5
    """

    name: str
    dataset: str = _data(
        "sinusoid, glyphs, omniglot, cifar-fs, fc100, cub, mini-imagenet, tfds:NAME or folder:PATH, or "
        f"an environment: {', '.join(ENVIRONMENTS)}"
    )
    paper: str
    table: str
    expected: str
    cost: str

    # Tasks.
    way: int = _data("classes per task (1 for regression)", where=_on_examples, default=5)
    shot: int = _data("support examples per class", where=_on_examples, default=1)
    query: int = _data("query examples per class in training", where=_on_examples, default=1)
    test_query: int = _data(
        "query examples per class in validation and test; affects batch statistics",
        where=_on_examples,
        default=1,
    )
    split: str = _data(
        "division of the classes: finn or vinyals for omniglot, or a file, which tfds: needs "
        "(without one, the classes of a folder are divided)",
        where=_on_images,
        default="",
    )
    image_size: int = _data(
        "height and width of the images in pixels (0: as in the dataset)",
        where=_on_images,
        default=0,
    )
    rotate_train: bool = _data(
        "rotate each class by a random multiple of 90 degrees in training",
        where=_on_images,
        default=False,
    )
    rotate_test: bool = _data(
        "rotate each class by a random multiple of 90 degrees in validation and test",
        where=_on_images,
        default=False,
    )
    crop: int = _data(
        "largest random shift of a training image, in pixels", where=_on_images, default=0
    )
    flip: bool = _data("mirror half of the training images", where=_on_images, default=False)
    jitter: float = _data(
        "largest relative change of brightness, contrast and saturation of a training image",
        where=_on_images,
        default=0.0,
    )

    # Trajectories.
    num_trajectories: int = _rollouts(
        "trajectories of each inner step, and of the query, in an environment",
        where=_in_environments,
        default=20,
    )
    horizon: int = _rollouts(
        "steps after which a trajectory is cut", where=_in_environments, default=100
    )
    discount: float = _rollouts("discount of rewards", where=_in_environments, default=0.99)
    gae_lambda: float = _rollouts(
        "decay of generalized advantage estimation (1: discounted returns minus a baseline)",
        where=_in_environments,
        default=1.0,
    )

    # Network.
    model: Literal["conv", "mlp", "resnet12"] = _model(
        "the network", where=_on_examples, default="conv"
    )
    num_filters: int = _model(
        "filters of each convolution (conv) or of the first block (resnet12)",
        where=_in_models("conv", "resnet12"),
        default=64,
    )
    pooled: bool = _model(
        "max-pooling instead of stride 2 (conv)", where=_in_models("conv"), default=False
    )
    hidden_sizes: tuple[int, ...] = _model(
        "units of each hidden layer (mlp, policies)", where=_in_hidden_layers, default=(40, 40)
    )
    norm: Literal["transductive", "inductive", "running", "per_step", "layer", "group", "none"] = (
        _model(
            "statistics of the normalization: of the batch (transductive), of the support "
            "(inductive), accumulated in training (running), the same per inner step (per_step), "
            "of each example (layer, group), or no normalization",
            where=_with_hidden_layers,
            default="transductive",
        )
    )
    per_step_weights: bool = _model(
        "with norm per_step: learn a scale and an offset per inner step too",
        where=_normalized_per_step,
        default=True,
    )
    norm_scale: bool = _model("learn a scale in the normalization", where=_normalized, default=True)
    adapt_norm: bool = _model(
        "adapt the normalization in the inner loop, not only in the outer loop",
        where=_normalized,
        default=True,
    )
    head_scale: float = _model(
        "standard deviation of the initial head", where=_on_examples, default=0.01
    )

    # Training.
    inner_lr: float = _inner("inner learning rate, for a mean loss", default=0.4)
    later_inner_lr: float = _inner(
        "inner learning rate after the first inner step (0: the same)",
        where=_in_environments,
        default=0.0,
    )
    num_inner_steps: int = _inner("inner steps in training", default=1)
    num_test_inner_steps: int = _inner("inner steps in validation and test", default=3)
    headline_step: int = _inner("inner step whose test score is the headline", default=3)
    outer: Literal["adam", "trpo", "promp"] = _outer(
        "the outer optimizer; in environments also trpo, which bounds the divergence of adapted "
        "policies, and promp: several clipped steps of Adam per sample",
        where=_in_environments,
        default="adam",
    )
    max_kl: float = _outer(
        "largest divergence of adapted policies by an outer step (trpo)",
        where=_with_outer("trpo"),
        default=0.01,
    )
    outer_lr: float = _outer(
        "outer learning rate (Adam)", where=_with_outer("adam", "promp"), default=1e-3
    )
    outer_clip: float = _outer(
        "clip each entry of the meta-gradient to this magnitude (0: no clipping)",
        where=_with_outer("adam", "promp"),
        default=0.0,
    )
    num_tasks: int = _outer("tasks per outer step", default=32)
    num_outer_steps: int = _outer("outer steps", default=60_000)
    chunk_size: int | Literal["auto", "all"] = _outer(
        "tasks computed at once: a number, auto or all", default="auto"
    )
    outer_schedule: Literal["constant", "cosine"] = _outer(
        "schedule of the outer learning rate; cosine ends at one hundredth",
        where=_with_outer("adam", "promp"),
        default="constant",
    )
    averaging: float = _outer(
        "decay of the moving average of the parameters, which is scored (0: no average)",
        where=_with_outer("adam", "promp"),
        default=0.0,
    )
    compute_dtype: Literal["float32", "bfloat16"] = _outer(
        "dtype of the network's computation; parameters and updates stay in float32",
        where=_on_examples,
        default="float32",
    )
    on_nonfinite: Literal["raise", "skip"] = _outer(
        "what happens to an outer step whose loss, gradient or update is not finite: it ends training "
        "(raise), or is left out and counted (skip); 100 skips in a row end training too",
        default="raise",
    )

    # Validation.
    num_validations: int = _validation(
        "validations during training, at most one per outer step", default=6
    )
    num_val_tasks: int = _validation("tasks per validation", where=_validated, default=100)
    selection_steps: tuple[int, ...] = _validation(
        "inner steps whose validation scores select the parameters (none: keep the last ones)",
        where=_validated,
        default=(),
    )
    num_averaged: int = _validation(
        "states with the best validation scores whose predictions are averaged in a further test "
        "(0 or 1: none)",
        where=_all(_on_examples, _selected),
        default=0,
    )
    patience: int = _validation(
        "validations without a better score after which training stops (0: never)",
        where=_selected,
        default=0,
    )

    @property
    def domain(self) -> Domain:
        """The kind of problem that a task is."""
        return domain_of(self.dataset)

    @property
    def is_regression(self) -> bool:
        """Whether the tasks are about regression."""
        return self.domain == "regression"

    @property
    def metric(self) -> Metric:
        """The score of a test."""
        return METRICS[self.domain]

    @property
    def core_chunk_size(self) -> int | Literal["auto"] | None:
        """The chunk size as `jaxmaml.meta_grad` takes it: None for all tasks."""
        return None if self.chunk_size == "all" else self.chunk_size


def options() -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields that are options of the command line, by name."""
    return {f.name: f for f in dataclasses.fields(Preset) if "help" in f.metadata}


def why_unused(preset: Preset, name: str) -> str:
    """Returns the setting because of which another one has no effect; "" if it has one.

    >>> mine = Preset(name="mine", dataset="sinusoid", paper="", table="", expected="", cost="")
    >>> why_unused(mine, "flip"), why_unused(mine, "shot")
    ("dataset='sinusoid'", '')
    """
    return options()[name].metadata["where"](preset)
