"""Writes blocks as one HTML page that needs no network, no script and no other file.

    page("What held", [Paragraph("**12** of 31 claims held.")], [Section("B", [Grid(...), Picture(...), Ruling(...)])])

The page suits phones, desktops and paper, in light and dark. The same blocks give the same bytes. Texts may hold `code`
in backticks and **bold** (not the page's title, ids and alt); everything else is escaped. Rulings are also counted and
listed at the top. Pictures keep their size unless the page is narrower: 5 inches wide with letters of 11 points stay
readable on a phone. A picture without colours for dark mode (prefers-color-scheme) stands on white.
"""

import base64
import itertools
import re
from collections import Counter
from html import escape
from pathlib import Path

from report.blocks import Folded, Grid, Paragraph, Passage, Picture, Ruling, Section
from report.verdicts import HELD, NOT_HELD, NOT_RUN, UNDECIDED
from support.palette import EXPERT_COLOURS, PAPER, PAPER_ON_DARK

# ---------------------------------------------------------------------------------------------------------------------
# Colours and shapes

# Text in any of these colours on `paper` or on `panel` has a contrast of 4.5 or more (WCAG AA; tests/test_page.py).
# The verdicts' hues are of those that colour-blind readers tell apart; their words and shapes do not need them.
PALETTE = {  # in light and in dark mode
    "paper": (PAPER, PAPER_ON_DARK),
    "panel": ("#f3f5f6", "#1e2327"),
    "line": ("#ccd3d8", "#3d464d"),
    "ink": ("#1a1d20", "#e6e8ea"),
    "quiet": ("#535b63", "#aab2b9"),
    "link": ("#0b57a4", "#8fbcf2"),
    "held": ("#00664b", "#5fcba5"),
    "failed": ("#a33a00", "#ff9d66"),
    "undecided": ("#5f3f97", "#c5b0f2"),
    "unrun": ("#535b63", "#aab2b9"),
}
LIGHT, DARK = ({name: colours[mode] for name, colours in PALETTE.items()} for mode in (0, 1))

# status -> (its colour, its shape in a box of 16 × 16)
LOOKS = {
    HELD: (
        "held",
        '<circle cx="8" cy="8" r="7.5" fill="currentColor"/>'
        '<path d="M4.3 8.4l2.6 2.6 4.8-5.6" fill="none" stroke="var(--paper)" stroke-width="2"/>',
    ),
    NOT_HELD: (
        "failed",
        '<path d="M1 1h14v14H1z" fill="currentColor"/>'
        '<path d="M4.7 4.7l6.6 6.6m0-6.6l-6.6 6.6" stroke="var(--paper)" stroke-width="2"/>',
    ),
    UNDECIDED: (
        "undecided",
        '<path d="M1 6.2q3.5-4.4 7 0t7 0M1 11.4q3.5-4.4 7 0t7 0" fill="none" stroke="currentColor" stroke-width="2"/>',
    ),
    NOT_RUN: (
        "unrun",
        '<circle cx="8" cy="8" r="6.5" fill="none" stroke="currentColor" stroke-width="2" stroke-dasharray="3 2.1"/>',
    ),
}


def _variables(palette):
    return "".join(f"--{name}: {colour}; " for name, colour in palette.items())


COLOURS = f"""
:root {{ color-scheme: light; {_variables(LIGHT)}}}
@media screen and (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {_variables(DARK)}}} }}
{"".join(f".{colour} {{ --status: var(--{colour}); }} " for colour, _ in LOOKS.values())}
{"".join(f".e{number} {{ background: {colour}; }} " for number, colour in enumerate(EXPERT_COLOURS))}
"""

# Nothing is smaller than 15 px on a screen. Code breaks anywhere, so that no command is wider than a phone.
LAYOUT = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


class _Sheet:
    """Anchors, figure numbers and rulings of the page that is being written."""

    def __init__(self):
        self.anchors = set()
        self.figures = itertools.count(1)
        self.rulings = []  # (ruling, its anchor)

    def anchor(self, text):
        """A new id for a place on the page, of letters, digits and hyphens."""
        name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        name = next(free for free in names if free not in self.anchors)
        self.anchors.add(name)
        return name


def _code(escaped):
    """Keeps the hyphens of an option with its first letter, for browsers break lines after any hyphen."""
    return "<code>" + re.sub(r"(?<![\w-])--?\w", r"<span>\g<0></span>", escaped) + "</code>"


def _inline(text):
    return _marked_up(escape(text))


def _marked_up(escaped):
    """`code` and **bold**, which may hold code; an interval, [0.1, 0.2], stays on one line."""

    def mark(match):
        code, bold, interval = match.groups()
        if code:
            return _code(code)
        return f"<b>{_marked_up(bold)}</b>" if bold else f'<span class="interval">{interval}</span>'

    return re.sub(r"`([^`]+)`|\*\*(.+?)\*\*|(\[\S{1,12}, \S{1,12}\])", mark, escaped)


def _lines(kind, lines):
    if not lines:
        return ""
    return f'<ul class="{kind}">' + "".join(f"<li>{_inline(line)}</li>" for line in lines) + "</ul>\n"


def _paragraph(block, sheet):
    return f"<p>{_inline(block.text)}</p>\n"


def _grid(block, sheet):
    assert all(len(row) == len(block.columns) for row in block.rows), f"{block.title}: a row has other columns"
    caption = sheet.anchor(f"table {block.title}")
    heads = "".join(f'<th scope="col"><span>{_inline(column)}</span></th>' for column in block.columns)
    rows = ""
    for label, *cells in block.rows:
        numbers = "".join(f"<td>{_inline(cell)}</td>" for cell in cells)
        rows += f'<tr><th scope="row">{_inline(label)}</th>{numbers}</tr>\n'
    return (
        f'<div class="grid"><div class="scroll" tabindex="0" role="region" aria-labelledby="{caption}">\n'
        f'<table><caption id="{caption}"><span>{_inline(block.title)}</span></caption>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n"
        f"{_lines('notes', block.notes)}</div>\n"
    )


def _picture(block, sheet):
    number = next(sheet.figures)
    data = base64.b64encode(block.svg.encode()).decode()
    plate = "" if "prefers-color-scheme" in block.svg else ' class="plate"'
    return (
        f'<figure id="{sheet.anchor(f"figure {number}")}">'
        f'<img{plate} src="data:image/svg+xml;base64,{data}" alt="{escape(block.alt)}">\n'
        f'<figcaption class="caption"><b>Figure {number}.</b> {_inline(block.caption)}</figcaption></figure>\n'
    )


def _shape_and_word(status):
    return f'<svg viewBox="0 0 16 16" aria-hidden="true">{LOOKS[status][1]}</svg>{status}'


def _verdict(ruling):
    return _shape_and_word(ruling.status) + (" <small>provisional</small>" if ruling.provisional else "")


def _ruling(block, sheet):
    anchor = sheet.anchor(f"claim {block.id}")
    sheet.rulings.append((block, anchor))
    return (
        f'<article class="ruling {LOOKS[block.status][0]}" id="{anchor}">\n'
        f'<h3><a href="#{anchor}">{escape(block.id)}</a> {_inline(block.sentence)}</h3>\n'
        f'<p><span class="verdict">{_verdict(block)}</span> '
        f'<span class="effect">{_inline(block.effect)}</span></p>\n'
        f"{_lines('details', block.details)}{_lines('notes', block.notes)}"
        + (f'<p class="source">{_inline(block.source)}</p>\n' if block.source else "")
        + "</article>\n"
    )


def _passage(block, sheet):
    def coloured(expert, text):
        return f'<span class="e{expert % len(EXPERT_COLOURS)}">{text}</span>'

    pieces = []
    for expert, group in itertools.groupby(zip(block.text, block.experts), key=lambda pair: pair[1]):
        text = escape("".join("⏎\n" if character == "\n" else character for character, _ in group))
        pieces.append(text if expert is None else coloured(expert, text))
    legend = "".join(coloured(expert, f"expert {expert}") for expert in range(block.n_expert))
    return (
        f'<div class="passage"><h3>{_inline(block.title)}</h3>\n<pre>{"".join(pieces)}</pre>\n'
        f'<p class="legend">{legend}</p></div>\n'
    )


def _folded(block, sheet):
    return _fold(_inline(block.title), _html_of(block.blocks, sheet))


def _fold(title, html):
    return f"<details><summary>{title}</summary>\n{html}</details>\n"


WRITERS = {Paragraph: _paragraph, Grid: _grid, Picture: _picture, Passage: _passage, Ruling: _ruling, Folded: _folded}


def _html_of(blocks, sheet):
    return "".join(WRITERS[type(block)](block, sheet) for block in blocks)


# ---------------------------------------------------------------------------------------------------------------------
# The page

OVERVIEW = "All verdicts"

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""


def _counts(rulings):
    """How many claims got each verdict, and how many of those are provisional."""
    counts = Counter(ruling.status for ruling, _ in rulings)
    provisional = Counter(ruling.status for ruling, _ in rulings if ruling.provisional)
    items = "".join(
        f'<li class="{colour}"><b>{counts[status]}</b> <span class="verdict">{_shape_and_word(status)}</span>'
        + (f" <small>{provisional[status]} provisional</small>" if provisional[status] else "")
        + "</li>\n"
        for status, (colour, _) in LOOKS.items()
    )
    return f'<ul class="counts" aria-label="Verdicts">\n{items}</ul>\n' if rulings else ""


def _overview_rows(rulings):
    return "".join(
        f'<tr class="{LOOKS[ruling.status][0]}"><th scope="row"><a href="#{anchor}">{escape(ruling.id)}</a></th>'
        f'<td class="claim">{_inline(ruling.sentence)}'
        + (f" <small>holds if {_inline(ruling.bounds)}</small>" if ruling.bounds else "")
        + "</td>"
        f'<td class="verdict">{_verdict(ruling)}</td>'
        f'<td class="effect">{_inline(ruling.effect)}</td></tr>\n'
        for ruling, anchor in rulings
    )


def _overview(groups, anchor):
    """groups: (section's title, its anchor, its rulings). Claims of which nothing was run are folded."""
    decided, missing = (
        [(title, place, chosen) for title, place, rulings in groups if (chosen := [r for r in rulings if keep(r[0])])]
        for keep in (lambda ruling: ruling.status != NOT_RUN, lambda ruling: ruling.status == NOT_RUN)
    )
    count = sum(len(rulings) for _, _, rulings in missing)
    return (
        f'<section><h2 id="{anchor}">{OVERVIEW}</h2>\n'
        + (_overview_table(decided, anchor) if decided else "")
        + (_fold(f"{count} {NOT_RUN}", _overview_table(missing, anchor)) if missing else "")
        + "</section>\n"
    )


def _overview_table(groups, anchor):
    bodies = "".join(
        '<tbody>\n<tr class="group"><th colspan="4" scope="rowgroup">'
        f'<a href="#{place}">{_inline(title)}</a></th></tr>\n{_overview_rows(rulings)}</tbody>\n'
        for title, place, rulings in groups
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("Id", "Claim", "Verdict", "Effect"))
    return f'<table class="overview" aria-labelledby="{anchor}">\n<thead><tr>{heads}</tr></thead>\n{bodies}</table>\n'


def page(title: str, lead: list, sections: list[Section]) -> str:
    """The whole page. lead: the blocks under the title, for a reader with one minute."""
    sheet = _Sheet()
    overview = sheet.anchor(OVERVIEW)
    anchors = [sheet.anchor(section.title) for section in sections]
    opening = _html_of(lead, sheet)
    contents, groups, body = [], [], []
    for section, anchor in zip(sections, anchors):
        before = len(sheet.rulings)
        blocks = _html_of(section.blocks, sheet)
        body.append(f'<section><h2 id="{anchor}">{_inline(section.title)}</h2>\n{blocks}</section>\n')
        contents.append((section.title, anchor))
        if sheet.rulings[before:]:
            groups.append((section.title, anchor, sheet.rulings[before:]))
    if groups:
        body.insert(0, _overview(groups, overview))
        contents.insert(0, (OVERVIEW, overview))
    links = "".join(f'<li><a href="#{anchor}">{_inline(title)}</a></li>\n' for title, anchor in contents)
    return (
        f"{HEAD}<title>{escape(title)}</title>\n<style>{COLOURS}{LAYOUT}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>\n{opening}{_counts(sheet.rulings)}</header>\n"
        + (f'<nav aria-label="Contents"><ul>\n{links}</ul></nav>\n' if links else "")
        + f"<main>\n{''.join(body)}</main>\n</body>\n</html>\n"
    )
