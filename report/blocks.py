"""The blocks that a report is made of: paragraphs, tables, pictures, verdicts. `page.py` writes them as HTML."""

from typing import NamedTuple


class Paragraph(NamedTuple):
    """Running text."""

    text: str


class Grid(NamedTuple):
    """A table: a column of labels, then columns of numbers. A line break within a cell is kept."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = []


class Picture(NamedTuple):
    """A figure as SVG."""

    svg: str  # the text of the file
    caption: str  # understood without the text around it
    alt: str  # what is seen, for those who do not see it


class Passage(NamedTuple):
    """A text, each character on the colour of its expert, and a legend."""

    title: str
    text: str
    experts: list[int | None]  # of each character; None: no expert
    n_expert: int


class Ruling(NamedTuple):
    """A claim and its verdict. `effect` is the line that decides, short enough for the list at the top."""

    id: str
    status: str  # of verdicts.STATUSES
    sentence: str
    effect: str = ""
    bounds: str = ""  # where the claim holds, as short
    source: str = ""
    details: list[str] = []
    notes: list[str] = []
    provisional: bool = False  # from too few seeds; shown wherever the verdict is


class Folded(NamedTuple):
    """Blocks behind a line that opens them."""

    title: str
    blocks: list


class Section(NamedTuple):
    """A heading and the blocks under it."""

    title: str
    blocks: list
