"""The blocks of a report, which each renderer writes in its own language."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias


class Paragraph(NamedTuple):
    """A paragraph of plain text."""

    text: str


class Table(NamedTuple):
    """A table of plain texts. The first cell of each row is its heading.

    Attributes:
        caption: what the table shows.
        header: the heading of each column.
        rows: the rows, of as many cells each.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """A picture.

    Attributes:
        name: the name of its file, without the suffix; no other picture of the report has it.
        caption: what it shows.
        alt: what a reader learns from it who does not see it.
        png: the contents of the file.
    """

    name: str
    caption: str
    alt: str
    png: bytes


class Listing(NamedTuple):
    """Text that keeps its lines.

    Attributes:
        summary: what the text is.
        text: the text.
        language: "json" or "latex".
        is_open: whether it is shown at once; otherwise it is folded away.
    """

    summary: str
    text: str
    language: str
    is_open: bool = False


Block: TypeAlias = Paragraph | Table | Picture | Listing


class Part(NamedTuple):
    """A part of the report, under a heading."""

    title: str
    blocks: Sequence[Block]


class Report(NamedTuple):
    """A report.

    Attributes:
        title: what was trained.
        notice: what a reader has to know first, or "".
        parts: its parts, in their order.
        footer: who wrote it, and when.
    """

    title: str
    notice: str
    parts: Sequence[Part]
    footer: str

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, in their order."""
        blocks = [block for part in self.parts for block in part.blocks]
        return [block for block in blocks if isinstance(block, Picture)]
