"""Messages are one line."""

import warnings

import pytest

from jaxmaml.experiments import messages


def test_a_message_is_one_line_without_endless_words():
    assert messages.one_line("a\n b\t" + "c" * 300) == f"a b {'c' * 60}... (300 characters)"


@pytest.mark.parametrize(
    "box",
    [
        "╭─ Title ───╮\n│ Unknown: --x, 3 │\n│ ───── │\n│ Perhaps:  │\n│    --xy INT │\n"
        "│  in jaxmaml data show --help │\n│ ───── │\n│ For full helptext, see y │\n╰────╯\n",
        " Title    \n ----- \n Unknown: --x, 3 \n ------ \n Perhaps:\n    --xy INT \n"
        "  in jaxmaml data show --help \n ----- \n For full helptext, see y \n   \n",
    ],
)
def test_the_box_of_a_mistake_becomes_a_line(box):
    assert messages.usage_error(box) == "Unknown: --x, 3; Perhaps: --xy INT"


def test_another_text_stays_as_it_is():
    assert messages.usage_error("no box") == "no box"


def test_a_warning_is_a_line_and_the_way_of_showing_it_is_restored(capsys):
    before = warnings.showwarning
    with messages.warnings_as_lines():
        warnings.simplefilter("always")
        warnings.warn("two\nlines", stacklevel=1)
    assert capsys.readouterr().err == "warning: two lines\n"
    assert warnings.showwarning is before
