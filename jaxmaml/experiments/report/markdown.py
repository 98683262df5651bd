"""A report as Markdown, in the dialect of GitHub, with its pictures as files beside it."""

import html
import re
from collections.abc import Sequence

from jaxmaml.experiments.report.blocks import Block, Listing, Paragraph, Picture, Report, Table


def render(report: Report) -> str:
    """Returns the text, in which a picture is the file `NAME.png`. Every text is escaped."""
    blocks = [f"# {escape(report.title)}"]
    if report.notice:
        blocks.append(f"> {escape(report.notice)}")
    for part in report.parts:
        blocks += [f"## {escape(part.title)}", *map(_block, part.blocks)]
    return "\n\n".join([*blocks, escape(report.footer)]) + "\n"


def escape(text: str) -> str:
    r"""Returns a text on one line in which Markdown gives no character a meaning of its own.

    >>> print(escape("maml_plus_plus | *5*"))
    maml\_plus\_plus \| \*5\*
    """
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", plain)


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return escape(text)
        case Table():
            return _table(block)
        case Picture():
            return f"![{escape(block.alt)}]({block.name}.png)\n\n*{escape(block.caption)}*"
        case Listing():
            return _listing(block)


def _table(table: Table) -> str:
    lines = [_row(table.header), _row([":--", *["--:"] * (len(table.header) - 1)], is_plain=True)]
    return "\n".join([f"{escape(table.caption)}:", "", *lines, *map(_row, table.rows)])


def _row(cells: Sequence[str], *, is_plain: bool = False) -> str:
    return f"| {' | '.join(cells if is_plain else map(escape, cells))} |"


def _listing(listing: Listing) -> str:
    # A fence is longer than any in the text.
    longest = max((len(run) for run in re.findall("`+", listing.text)), default=0)
    fence = "`" * max(3, longest + 1)
    code = f"{fence}{listing.language}\n{listing.text.rstrip()}\n{fence}"
    if listing.is_open:
        return f"{escape(listing.summary)}:\n\n{code}"
    summary = html.escape(listing.summary)
    return f"<details>\n<summary>{summary}</summary>\n\n{code}\n\n</details>"
