"""The programs of docs/guides.md run from top to bottom, and say what the guide says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

GUIDES = Path(__file__).parents[1] / "docs" / "guides.md"


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The output of each program; they share their names, as the guides say."""
    names, found = {}, []
    text = GUIDES.read_text("utf-8")
    with contextlib.chdir(tmp_path_factory.mktemp("guides")):
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start(1))
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("\n" * line + match.group(1), str(GUIDES), "exec"), names)
            found.append(out.getvalue())
    return found


def test_the_programs_say_what_the_guides_say(printed):
    images, inner, loss, kept, broken = printed
    assert images == "(4, 5, 8, 8, 1) (4, 25)\n"
    *losses, rates = inner.splitlines()
    assert all(float(value) < 20 for value in losses)
    assert "log_lr" in rates
    assert 0 < float(loss) < 20
    assert kept == "True\n"
    assert broken == "support targets\n"


def test_every_link_leads_to_a_heading():
    text = GUIDES.read_text("utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings
    }
    assert set(re.findall(r"\(#([a-z0-9-]+)\)", text)) == anchors
