"""Random command lines: exit code 0 or 2, no traceback, and every accepted option has its effect.

Everything runs as for a user, except that networks are built without numbers, datasets are small,
and nothing is trained or drawn.
"""

import functools
import io
import math
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from jaxmaml import cli
from jaxmaml.data import datasets, pools, stored_images
from jaxmaml.experiments import compare, figures, networks, options, presets, provenance, settings
from jaxmaml.experiments.domains import domain_of

NUM_CLASSES, NUM_PER_CLASS = 25, 24

PRESETS = ["sinusoid-5shot", "glyphs-5w1s", "omniglot-mlp-5w1s", "mini-imagenet-5w1s", "nav2d"]
STRANGE = [
    *("-1", "0", "1", "2", "1.5", "1e39", "-1e-3", "1e-46", "nan", "inf", "-inf", "True", "None"),
    *("99999999999999999999", "1000000000", "4294967296", "", " ", "x", "MAML", "é ± ∞", "[bold]"),
    *("-", "--", "a\x00b", "x" * 3000),
]  # fmt: skip
USUAL = {
    "way": ["2", "5"], "shot": ["1", "3"], "query": ["1", "2"], "test_query": ["1", "3"],
    "num_trajectories": ["2"], "horizon": ["3"], "discount": ["0", "0.9"], "gae_lambda": ["1"],
    "later_inner_lr": ["0", "0.1"], "outer": ["adam", "trpo", "promp"], "max_kl": ["0.1"],
    "dataset": ["sinusoid", "nav2d", "glyphs", "cifar-fs", "folder:nowhere", "tfds:nothing"],
    "split": ["finn", "vinyals", "script", "nothing.json"], "image_size": ["0", "14", "28"],
    "crop": ["0", "3"], "jitter": ["0.1"], "model": ["conv", "mlp", "resnet12"],
    "num_filters": ["4", "64"], "hidden_sizes": ["8", "8 4"],
    "norm": ["transductive", "inductive", "running", "per_step", "layer", "group", "none"],
    "head_scale": ["0", "1.0"], "inner_lr": ["0.1", "0.5"], "num_inner_steps": ["0", "3"],
    "num_test_inner_steps": ["1", "10"], "headline_step": ["0", "2"], "outer_lr": ["0.01"],
    "outer_clip": ["1.0"], "num_tasks": ["2", "8"], "num_outer_steps": ["10"],
    "chunk_size": ["1", "auto", "all"], "outer_schedule": ["constant", "cosine"],
    "averaging": ["0", "0.9"], "compute_dtype": ["bfloat16", "float32"],
    "num_validations": ["0", "2"], "num_val_tasks": ["10"], "selection_steps": ["1", "0 1"],
    "num_averaged": ["0", "5"], "patience": ["0", "3"], "on_nonfinite": ["raise", "skip"],
    "num_seeds": ["1", "3", "1000000000"], "checkpoint_every": ["0", "1", "100"],
    "learner": ["maml", "fomaml", "anil", "reptile", "protonet", "cavia", "maml_plus_plus"],
    "learners": ["maml,fomaml", "protonet", "protonet,maml", "reptile,imaml", "r2d2,protonet"],
    "order": ["exact", "first"], "inner_lrs": ["0.1", "0.1 0.2", "0.1 0.1"],
    "seed": ["0", "3", "4294967295"], "num_test_tasks": ["2", "50"], "data_dir": ["nowhere"],
    "matmul_precision": ["default", "highest"], "num_workers": ["0", "2"],
    "fractions": ["0.6 0.2 0.2", "0.3 0.3 nan", "1 0 0"],
}  # fmt: skip
"""Values of each option that somebody could give."""
FLAGS = ["rotate_train", "rotate_test", "flip", "pooled", "per_step_weights", "norm_scale",
         "adapt_norm", "stream", "image_cache", "tensorboard"]  # fmt: skip
RUN = ["seed", "num_seeds", "num_test_tasks", "data_dir", "matmul_precision", "num_workers",
       "stream", "image_cache", "checkpoint_every", "tensorboard"]  # fmt: skip
OF_COMMAND = {
    "train": [*settings.options(), *RUN, "learner", "order"],
    "compare": [*settings.options(), *RUN, "learners", "inner_lrs"],
    "data show": [*options.SHOWN, "data_dir"],
    "data split": ["fractions", "seed", "data_dir"],
}
ON_IMAGES = {"split", "image_size", "rotate_train", "rotate_test", "crop", "flip", "jitter",
             "stream"}  # fmt: skip
OF_MODEL = {"num_filters": ("conv", "resnet12"), "pooled": ("conv",), "hidden_sizes": ("mlp",)}
INNER = {"inner_lr", "inner_lrs", "num_inner_steps", "num_test_inner_steps", "headline_step"}


class Line(NamedTuple):
    """A command line: its command, its preset or dataset, and the words of each option."""

    command: str
    name: str
    options: dict[str, list[str]]

    def words(self, out: str) -> list[str]:
        """Returns the arguments of `cli.main`."""
        given = [word for words in self.options.values() for word in words]
        return [*self.command.split(), self.name, *given, "--out", out]


def _words(option: str, value: str) -> list[str]:
    name = option.replace("_", "-")
    if option in FLAGS:
        return [f"--{name}" if value in ("1", "True") else f"--no-{name}"]
    return [f"--{name}", *(value.split() or [value])]


@st.composite
def lines(draw: st.DrawFn) -> Line:
    """Draws a command line with up to four options."""
    command = draw(st.sampled_from(["train", "train", "compare", "data show", "data split"]))
    names = PRESETS if command != "data split" else ["glyphs", "nothing"]
    name = draw(st.sampled_from(names) if draw(st.integers(0, 9)) else st.text(max_size=9))
    chosen = draw(st.lists(st.sampled_from(OF_COMMAND[command]), max_size=4, unique=True))
    given = {}
    for option in chosen:
        usual = ["1", "0"] if option in FLAGS else USUAL[option]
        value = draw(st.sampled_from(usual if draw(st.integers(0, 4)) else STRANGE))
        given[option] = _words(option, value)
    return Line(command, name, given)


@functools.cache
def _stored(size: int, channels: int) -> stored_images.Images:
    shape = (NUM_CLASSES * NUM_PER_CLASS, size, size, channels)
    labels = np.arange(shape[0]) % NUM_CLASSES
    names = [str(i) for i in range(NUM_CLASSES)]
    return stored_images.from_arrays(np.zeros(shape, np.uint8), labels, names)


def _opened(real: Any, dataset: str, data_dir: Any, class_split: Any, size: Any, **options: Any):
    """Stands for `datasets.images`: small images of a known dataset, or the error of the real one."""
    del options
    if dataset not in datasets.DATASETS or data_dir is not None:
        return real(dataset, data_dir, class_split, size)
    known = datasets.DATASETS[dataset]
    datasets._known_class_split(dataset, class_split or known.class_splits[0])
    shape = size or known.format.size, 1 if known.format.mode == "L" else 3
    return dict.fromkeys(("train", "val", "test"), _stored(*shape))


@functools.cache
def _pool(size: int, channels: int) -> pools.Pool:
    return pools.from_images(_stored(size, channels))


def _without_numbers(build: Any, *args: Any, **kwargs: Any) -> networks.Network:
    """Stands for `networks.build`: the same network, whose parameters have shapes only."""
    made = []

    def arrays(key):
        preset, shape, _ = args
        made.append(build(preset, shape, key, **kwargs))
        return made[0].params, made[0].state

    params, state = jax.eval_shape(arrays, args[2])
    return made[0]._replace(params=params, state=state)


class Commands(NamedTuple):
    """`cli.main` without training, and what it would have trained."""

    comparisons: list[Any]
    out: Any

    def run(self, line: Line) -> tuple[int, str, Any]:
        """Returns (exit code, what is printed, the comparison)."""
        self.comparisons.clear()
        out = self.out / str(len(list(self.out.iterdir())))
        name = out / "a.png" if line.command == "data show" else out
        with redirect_stdout(io.StringIO()) as printed, redirect_stderr(printed):
            try:
                code = cli.main(line.words(str(name)))
            except SystemExit as stop:
                code = stop.code
        comparison = self.comparisons[0] if self.comparisons else None
        return code, printed.getvalue(), comparison  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The commands, with small datasets and without training."""
    images, build = datasets.images, networks.build
    opened = functools.partial(_opened, images)

    def load(*where):
        return {split: _pool(*found.shape[1:]) for split, found in opened(*where).items()}

    comparisons: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "xla"))
        patch.setattr(datasets, "images", opened)
        patch.setattr(datasets, "load", load)
        patch.setattr(datasets, "class_names", lambda *where: [str(i) for i in range(20)])
        patch.setattr(networks, "build", functools.partial(_without_numbers, build))
        patch.setattr(provenance, "commit", lambda: None)
        patch.setattr(figures, "draw_episode", lambda experiment, path: None)
        patch.setattr(compare, "execute", lambda found: comparisons.append(found) or [])
        yield Commands(comparisons, tmp_path_factory.mktemp("runs"))


def _as_given(value: Any, words: list[str]) -> bool:
    """Returns whether the words of an option say a value of config.json."""
    if isinstance(value, bool):
        return words == [words[0].replace("--no-", "--") if value else words[0]]
    if isinstance(value, list | tuple):
        return len(value) == len(words) - 1 and all(
            _as_given(one, ["", word]) for one, word in zip(value, words[1:], strict=True)
        )
    if isinstance(value, float):
        return math.isclose(value, float(words[1]))
    return str(value) == words[1].strip()


def _check_effect(line: Line, comparison: Any) -> None:
    """Checks that each option is in the configuration, and is one that these runs use."""
    config = comparison.config
    preset, runs = config["preset"], config["runs"]
    only_filled = {run["learner"] for run in runs} <= {"protonet", "r2d2"}
    for option, words in line.options.items():
        # The configuration has what was given.
        if option in preset:
            assert _as_given(preset[option], words), option
        elif option in ("seed", "num_seeds", "num_test_tasks", "matmul_precision"):
            assert _as_given(config[option], words), option
        elif option in ("checkpoint_every", "tensorboard"):
            assert _as_given(getattr(comparison, option), words), option
        elif option == "learner":
            assert runs[0]["label"].split(",")[0] == words[1] or words[1] == "maml"
        elif option == "order":
            assert runs[0]["order"] == words[1]
        elif option == "inner_lrs":
            assert {run["inner_lr"] for run in runs} == {float(word) for word in words[1:]}
        elif option in ("stream", "image_cache", "num_workers"):
            is_stream = not callable(comparison.experiment.sources["train"])
            default = words[0] in ("--no-stream", "--image-cache") or words[1:] == ["0"]
            assert is_stream or default

        # The runs use it.
        if words[0] != "--no-stream":
            is_image = domain_of(preset["dataset"]) == "classification"
            assert option not in ON_IMAGES or is_image, option
        is_policy = domain_of(preset["dataset"]) == "reinforcement"
        assert is_policy or preset["model"] in OF_MODEL.get(option, (preset["model"],)), option
        assert not is_policy or option not in ("model", "num_filters", "pooled", "norm"), option
        assert not (only_filled and option in INNER), option
        assert option != "order" or not only_filled


def _check(commands: Commands, line: Line) -> None:
    code, printed, comparison = commands.run(line)
    assert code in (0, 2), printed
    assert "Traceback" not in printed
    assert "x" * 1000 not in printed
    if code == 0 and line.command in ("train", "compare"):
        _check_effect(line, comparison)


@hypothesis.settings(max_examples=60)
@hypothesis.given(line=lines())
def test_a_line_is_refused_or_has_its_effect(commands, line):
    _check(commands, line)


@pytest.mark.slow
@hypothesis.settings(max_examples=5000)
@hypothesis.given(line=lines())
def test_thousands_of_lines_are_refused_or_have_their_effect(commands, line):
    _check(commands, line)


def test_the_lines_are_accepted_and_refused(commands):
    """The stand-ins let a line through that trains, and a preset of each kind is accepted."""
    for name in PRESETS:
        code, printed, comparison = commands.run(Line("train", name, {}))
        assert code == 0, printed
        assert comparison.config["preset"]["name"] == name
    assert commands.run(Line("train", "glyphs-5w1s", {"way": ["--way", "1"]}))[0] == 2
    assert set(presets.PRESETS) >= set(PRESETS)


def test_every_option_can_be_drawn():
    for name in {name for names in OF_COMMAND.values() for name in names}:
        assert (name in FLAGS) != (name in USUAL), name
