"""The English of the code is plain and American, as CONTRIBUTING.md says."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("jaxmaml", "tests")
"""The folders that are checked."""
PATHS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
FILES = [path for path in PATHS if path != Path(__file__).resolve()]
"""The files that are checked: not this one, which has examples of what it finds."""

OPENINGS = ("What", "Of", "Which", "Those", "Whose", "As", "How")
"""Words that do not begin a docstring: it starts with what the function returns or does."""
PHRASES = re.compile(
    r"unless told|so many|once for all|kept of"
    # "the size is no integer", but neither "there is no file" nor "is no longer read"
    r"|(?<!there )\b(?:is|are) no (?!longer|more|less|fewer)[a-z]+"
    # "one file an algorithm", for "one file per algorithm"
    r"|\bone (?:array|axis|device|dispatch|file|key|number|process|rate|step)s? an?(?= )",
    re.IGNORECASE,
)
BRITISH = re.compile(
    # normalise, optimisation, ...: verbs whose American form has a z
    r"(?:general|initial|linear|material|maxim|memor|minim|normal|optim|organ|parallel|penal|quant"
    r"|random|real|recogn|regular|serial|special|standard|summar|symmetr|synchron|util|vector|visual)"
    r"is(?:e|ed|er|ers|es|ing|ation|ations)(?![a-z])"
    r"|colour|neighbour|behaviour|favour|centre(?!d)|grey|programme(?!d|r)|catalogue|artefact"
    r"|analyse(?!s)|judgement|modelling|modelled|labelled|labelling|cancelled",
    re.IGNORECASE,
)
JSON_KEYS = re.compile(r"(?<=[\"'])nearest_neighbour(?:_on_features)?(?=[\"'])")
"""Keys of results.json, which stay as they were first written."""


def _docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Yields the line and the text of every docstring, those of constants included."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))):
                yield node.lineno, text


def _comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def bad_openings(source: str) -> list[str]:
    """Returns "line: text" of the docstrings that start with one of `OPENINGS`."""
    return [
        f"{line}: {text.strip().splitlines()[0]}"
        for line, text in _docstrings(source)
        if text.split() and text.split()[0] in OPENINGS
    ]


def bad_phrases(source: str) -> list[str]:
    """Returns "line: phrase" of the phrases of `PHRASES` in docstrings and comments."""
    texts = [*_docstrings(source), *_comments(source)]
    return [
        f"{line + text.count(chr(10), 0, match.start())}: {match.group()}"
        for line, text in texts
        for match in PHRASES.finditer(text)
    ]


def british_words(source: str) -> list[str]:
    """Returns "line: word" of British spellings: identifiers, docstrings, comments and messages."""
    return [
        f"{number}: {match.group()}"
        for number, line in enumerate(source.splitlines(), 1)
        for match in BRITISH.finditer(JSON_KEYS.sub("", line))
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_english_is_plain_and_american(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert bad_openings(source) == []
    assert bad_phrases(source) == []
    assert british_words(source) == []


@pytest.mark.parametrize(
    ("check", "source", "found"),
    [
        (bad_openings, 'def f():\n    """What it does."""', ["2: What it does."]),
        (bad_openings, 'x = 1\n"""How x is used."""', ["2: How x is used."]),
        (bad_openings, '"""Returns what it does."""', []),
        (bad_phrases, "# 5 unless told otherwise", ["1: unless told"]),
        (bad_phrases, '"""Checks.\n\nIf it is no integer.\n"""', ["3: is no integer"]),
        (bad_phrases, "# There is no file. It is no longer read.", []),
        (bad_phrases, "# One file an algorithm.", ["1: One file an"]),
        (bad_phrases, 'x = "unless told"', []),
        (british_words, "def initialise_layer(): ...", ["1: initialise"]),
        (british_words, "# normalisations", ["1: normalisations"]),
        (british_words, 'x = "colours"', ["1: colour"]),
        (british_words, "nearest_neighbour = 1", ["1: neighbour"]),
        (british_words, 'x["nearest_neighbour_on_features"]', []),
        (british_words, "# optimistic, precise, centered, memory_analysis(), analyses", []),
    ],
)
def test_the_checks_find_what_they_are_for(check, source, found) -> None:
    assert check(source) == found
