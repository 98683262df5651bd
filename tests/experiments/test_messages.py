"""Messages are one line."""

import warnings

from jaxmaml.experiments import messages


def test_a_message_is_one_line_without_endless_words():
    assert messages.one_line("a\n b\t" + "c" * 300) == f"a b {'c' * 60}... (300 characters)"


def test_a_warning_is_a_line_and_the_way_of_showing_it_is_restored(capsys):
    before = warnings.showwarning
    with messages.warnings_as_lines():
        warnings.simplefilter("always")
        warnings.warn("two\nlines", stacklevel=1)
    assert capsys.readouterr().err == "warning: two lines\n"
    assert warnings.showwarning is before
