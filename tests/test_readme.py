"""The examples of README.md run in their order, and what they say happens."""

import ast
import builtins
import contextlib
import functools
import io
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from experiments.tiny import save_untrained
from PIL import Image

import jaxmaml
from jaxmaml import cli
from jaxmaml.experiments import presets

README = Path(__file__).parents[1] / "README.md"
FOUR_PROGRAMS = (
    "apply_fn, params = nn.from_equinox(model)",
    "query_weights=jaxmaml.multi_step_weights(5, 10_000)",
    "learner, nn.accuracy(apply_fn), meta_state, test_source, num_tasks=600, key=key",
    "rates = jaxmaml.learned_rates(meta_state)",
)
"""A line of each program that users of 0.1 had to write by hand."""


class Block(NamedTuple):
    """A block of code, the line of README.md at which it starts, and what came of it."""

    line: int
    source: str
    names: dict[str, Any]
    printed: str


def _blocks() -> list[tuple[int, str]]:
    """Returns the Python blocks of README.md, each with the line of its first statement."""
    text = README.read_text("utf-8")
    matches = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match.group(1)) for match in matches]


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> list[Block]:
    """All blocks, run one after the other in one namespace."""
    names: dict[str, Any] = {}
    done = []
    place = tmp_path_factory.mktemp("readme")
    _prepare(place)
    with contextlib.chdir(place):
        for line, source in _blocks():
            with contextlib.redirect_stdout(io.StringIO()) as out:
                # The empty lines give an error in the block the line number of README.md.
                exec(compile("\n" * (line - 1) + source, str(README), "exec"), names)
            done.append(Block(line, source, dict(names), out.getvalue()))
    return done


def _prepare(place: Path) -> None:
    """Makes what the commands of README.md leave: a run (untrained here), a support, new pictures."""
    preset = presets.override(presets.get("pictures-5w1s"), dataset="folder:gone", num_filters=4)
    save_untrained(place / "RUN", preset, "maml", (32, 32, 3))
    (place / "new").mkdir()
    for number, name in enumerate(("hamburger", "owl", "rocket", "carrot")):
        picture = Image.new("RGBA", (64, 64), (60 * number, 100, 200, 128))
        (place / "four" / name).mkdir(parents=True)
        picture.save(place / "four" / name / "google.png")
        picture.save(place / "new" / f"{name}.png")


def test_a_dataset_of_the_user_is_opened_with_a_division_of_its_classes() -> None:
    text = README.read_text("utf-8")
    calls = re.findall(r'datasets\.(?:images|load)\("(?:folder|tfds):[^)]*\)', text)
    assert calls
    assert all("class_split=" in call for call in calls)
    assert not [source for _, source in _blocks() if re.search(r'"(?:folder|tfds):[A-Z]+"', source)]


def test_every_python_block_is_run(blocks: list[Block]) -> None:
    # A fence of another spelling, such as ```py, would not be run.
    fences = re.findall(r"^\s*```(\w+)", README.read_text("utf-8"), re.MULTILINE)
    assert set(fences) <= {"python", "sh", "bibtex"}
    assert len(blocks) == fences.count("python")


def test_the_first_example_learns(blocks: list[Block]) -> None:
    *rows, last = (line.split() for line in blocks[0].printed.splitlines())
    assert [int(step) for step, _ in rows] == list(range(100, 1001, 100))
    assert float(rows[-1][1]) < 0.1  # predicting zero costs 0.29
    assert last[:5] == ["loss", "on", "a", "new", "task:"]
    assert blocks[0].names["adapted"].keys() == blocks[0].names["params"].keys()


def test_adaptation_helps_in_the_first_example_on_average(blocks: list[Block]) -> None:
    names = blocks[0].names
    losses = jaxmaml.evaluate(
        names["learner"], names["loss_fn"], names["meta_state"], names["source"], num_tasks=320,
        key=jax.random.key(5),
    )  # fmt: skip
    assert losses[:, -1].mean() < 0.5 * losses[:, 0].mean()


def test_the_model_learns_and_is_scored_on_600_tasks(blocks: list[Block]) -> None:
    (scored,) = (block for block in blocks if "num_tasks=600" in block.source)
    assert scored.names["scores"].shape == (600, 6)
    assert scored.names["mean"][-1] > 1.5 * scored.names["mean"][0]
    assert re.fullmatch(r"test accuracy 0\.\d{3} ± 0\.0\d\d\n", scored.printed)


def test_the_programs_import_what_they_use() -> None:
    # A block that begins with an import starts a program; the blocks after it continue it.
    begins = ("import ", "from pathlib import ")
    starts = [(line, source) for line, source in _blocks() if source.startswith(begins)]
    assert len(starts) == 4
    for line, source in starts:
        assert not _unbound(ast.parse(source)), f"README.md:{line}"


def _unbound(tree: ast.AST) -> set[str]:
    """Returns the names that a module reads and never binds."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        match node:
            case ast.Import() | ast.ImportFrom():
                bound |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            case ast.FunctionDef():
                bound.add(node.name)
            case ast.arg():
                bound.add(node.arg)
    return read - bound - set(dir(builtins))


def test_learned_rates_are_read_back_by_layer(blocks: list[Block]) -> None:
    (learned,) = (block for block in blocks if "learned_rates" in block.source)
    rates = learned.names["rates"]
    assert {values.shape for values in rates.values()} == {(5,)}
    assert any((values != 0.4).any() for values in rates.values())


def test_the_stream_gives_what_the_comment_says(blocks: list[Block]) -> None:
    (streamed,) = (block for block in blocks if "stream.sampler(" in block.source)
    assert streamed.printed == "(32, 75, 28, 28, 1)\n"


def test_a_loaded_run_predicts_and_so_does_its_export(blocks: list[Block]) -> None:
    loaded, exported = (block for block in blocks if "owl.png" in block.source)
    assert loaded.printed.count("'hamburger': ") == 2
    assert exported.printed == "(1, 4) (5,)\n"
    # The picture is read as `read_images` reads it.
    predicted = loaded.names["adapted"].predict(loaded.names["images"])
    np.testing.assert_allclose(exported.names["probabilities"][0], predicted[0], rtol=1e-4)


def _commands() -> list[str]:
    """Returns the `jaxmaml` commands in the shell blocks of README.md."""
    text = README.read_text("utf-8")
    shell = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return re.findall(r"(?:^|&& )(jaxmaml .*)", "".join(shell), re.MULTILINE)


@pytest.mark.parametrize("command", _commands())
def test_a_command_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses it, and runs nothing."""
    nothing = lambda command, _: functools.wraps(command)(lambda *args, **options: lambda: 0)
    monkeypatch.setattr(cli, "_deferred", nothing)
    assert cli.main(shlex.split(command, comments=True)[1:]) == 0


@pytest.mark.parametrize("statement", FOUR_PROGRAMS)
def test_the_four_programs_stand_in_the_readme(statement: str, blocks: list[Block]) -> None:
    assert sum(statement in block.source for block in blocks) == 1
