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

from report.blocks import Grid, Paragraph, Passage, Picture, Ruling, Section
from report.verdicts import HELD, NOT_HELD, NOT_RUN, UNDECIDED
from support.palette import EXPERT_COLOURS, PAPER, PAPER_ON_DARK

# ---------------------------------------------------------------------------------------------------------------------
# Colours and shapes

# Text in any of these colours on `paper` or on `panel` has a contrast of 4.5 or more (WCAG AA; tests/test_page.py).
# The verdicts' hues are of those that colour-blind readers tell apart; their words and shapes do not need them.
LIGHT = {
    "paper": PAPER,
    "panel": "#f3f5f6",
    "line": "#ccd3d8",
    "ink": "#1a1d20",
    "quiet": "#535b63",
    "link": "#0b57a4",
    "held": "#00664b",
    "failed": "#a33a00",
    "undecided": "#5f3f97",
    "unrun": "#535b63",
}
DARK = {
    "paper": PAPER_ON_DARK,
    "panel": "#1e2327",
    "line": "#3d464d",
    "ink": "#e6e8ea",
    "quiet": "#aab2b9",
    "link": "#8fbcf2",
    "held": "#5fcba5",
    "failed": "#ff9d66",
    "undecided": "#c5b0f2",
    "unrun": "#aab2b9",
}


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
LAYOUT = """* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; scroll-padding-top: 1rem; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 78rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: break-word;
}
h1, h2, h3 { line-height: 1.25; }
h1, h2 { text-wrap: balance; }
h1 { font-size: 1.9rem; margin: 0 0 1rem; }
h2 { font-size: 1.4rem; margin: 3rem 0 1rem; padding-top: .75rem; border-top: 2px solid var(--line); }
p, .notes { max-width: 44rem; margin: 0 0 1rem; }
a { color: var(--link); text-underline-offset: .15em; }
code {
  font: max(.9375rem, .9em)/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  background: var(--panel); border-radius: .2rem; padding: .05em .25em; overflow-wrap: anywhere;
  box-decoration-break: clone; -webkit-box-decoration-break: clone;
}
code span, .interval { white-space: nowrap; }
.passage { margin: 0 0 1.5rem; }
.passage h3 { font-size: 1rem; margin: 0 0 .35rem; }
.passage pre {
  font: .9375rem/1.7 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .35rem;
}
.passage [class] { color: #000; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.legend span { padding: .1em .5em; margin-right: .5em; }
ul, ol { margin: 0; padding: 0; list-style: none; }
.notes, .source, .caption { font-size: .9375rem; color: var(--quiet); }
.notes li + li, .details li + li { margin-top: .3rem; }
small { font-size: .9375rem; font-weight: 400; color: var(--quiet); }

.counts { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1.25rem 0 0; }
.counts b { font-size: 1.4rem; }
.counts small { display: block; }
.verdict { color: var(--status); font-weight: 600; white-space: nowrap; }
.verdict svg { width: .95em; height: .95em; margin-right: .4em; vertical-align: -.1em; }

nav { margin: 2rem 0; font-size: .9375rem; }
nav li a { display: block; padding: .3rem 0; text-decoration: none; }
nav li a:hover { text-decoration: underline; }

table { border-collapse: collapse; font-size: .9375rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
caption { text-align: left; }
caption, .overview td, .overview .group { overflow-wrap: anywhere; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid var(--quiet); vertical-align: bottom; }
tbody th { font-weight: 400; }

.grid, figure { margin: 1.5rem 0 2rem; }
.grid .notes { margin: .6rem 0 0; }
/* A wide table scrolls by itself; a shade at its edge says that there is more. */
.scroll {
  overflow-x: auto; container-type: inline-size;
  background:
    linear-gradient(to left, var(--paper) 40%, transparent) right / 2.5rem 100% no-repeat local,
    linear-gradient(to left, var(--line), transparent) right / .9rem 100% no-repeat scroll;
}
.grid table { min-width: min(100%, 30rem); }
.grid caption span { display: block; position: sticky; left: 0; width: fit-content; max-width: 100cqw; }
.grid caption { padding-bottom: .5rem; font-weight: 600; background: var(--paper); }
.grid th { white-space: pre-line; }
.grid thead th { font-weight: 600; color: var(--quiet); }
.grid thead span { display: inline-block; max-width: 9rem; }
.grid td { white-space: pre; }
.grid td, .grid thead th:not(:first-child) { text-align: right; }
.grid tr > :first-child {
  position: sticky; left: 0; background: var(--paper); padding-left: 0; min-width: 7.5rem; max-width: 18rem;
}

img { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 44rem; margin-top: .6rem; }
.caption b { color: var(--ink); }
@media screen and (prefers-color-scheme: dark) { .plate { background: #fff; padding: .5rem; border-radius: .3rem; } }

.overview { width: 100%; }
.overview th:first-child { padding-left: 0; white-space: nowrap; }
.overview small { display: block; font-size: inherit; }
.overview .group th { padding-top: 1.4rem; font-weight: 600; white-space: normal; }

.ruling { margin: 0 0 1.75rem; padding-left: .9rem; border-left: .25rem solid var(--status); }
.ruling h3 { font-size: 1.0625rem; margin: 0 0 .35rem; }
.ruling h3 a { margin-right: .35em; }
.ruling p, .ruling ul { margin: 0 0 .35rem; font-variant-numeric: tabular-nums; }
.ruling .verdict { margin-right: .6em; }
.ruling .effect { display: inline-block; max-width: 100%; }
.details { font-size: .9375rem; }
.details li { padding-left: 1rem; text-indent: -1rem; }

:target { background: var(--panel); }

@media (max-width: 40rem) {
  h1 { font-size: 1.6rem; }
  h2 { font-size: 1.3rem; }
  .counts { display: grid; grid-template-columns: 1fr 1fr; gap: .5rem 1rem; }
  .grid tr > :first-child { max-width: 9.5rem; padding-right: .5rem; border-right: 1px solid var(--line); }
}
@media screen and (max-width: 40rem) {
  /* Four columns do not fit: number and verdict, then the claim, then its effect. */
  .overview thead { display: none; }
  .overview, .overview tbody { display: block; }
  .overview tr {
    display: grid; grid-template-columns: 3.5rem 1fr; padding: .6rem 0; border-bottom: 1px solid var(--line);
  }
  .overview th, .overview td { border: 0; padding: .1rem 0; }
  .overview .group th, .overview .claim, .overview .effect { grid-column: 1 / -1; }
  .overview .verdict { grid-row: 1; grid-column: 2; }
  .overview small { display: inline; }
}
@media screen and (min-width: 68rem) {
  body { display: grid; grid-template-columns: 14rem minmax(0, 1fr); column-gap: 3rem; padding: 2.5rem 2rem 4rem; }
  header, main { grid-column: 2; }
  nav {
    grid-column: 1; grid-row: 1 / span 2; position: sticky; top: 2.5rem; align-self: start; margin: 0;
    max-height: calc(100vh - 5rem); overflow-y: auto;
  }
}

@page { margin: 15mm 14mm; }
@media print {
  html { font-size: 10pt; }
  body { padding: 0; max-width: none; }
  a { color: inherit; text-decoration: none; }
  nav ul { columns: 2; }
  h2, h3, caption, .group { break-after: avoid; page-break-after: avoid; }
  figure, tr, .ruling, .counts { break-inside: avoid; page-break-inside: avoid; }
  .notes { break-before: avoid; page-break-before: avoid; }
  p, li { orphans: 3; widows: 3; }
  .scroll { overflow: visible; container-type: normal; background: none; }
  .grid table, .overview { width: 100%; font-size: 8pt; }
  .grid td { white-space: pre-line; }
  .grid tr > :first-child { position: static; min-width: 0; max-width: 11rem; border-right: 0; }
  .grid caption span { position: static; max-width: none; }
  th, td { padding: .25rem .35rem; }
  img { max-height: 200mm; margin: 0; }
  :target { background: none; }
}
"""


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
    rows = "".join(
        f'<tr><th scope="row">{_inline(label)}</th>'
        + "".join(f"<td>{_inline(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for label, *cells in block.rows
    )
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
    pieces = []
    for expert, group in itertools.groupby(zip(block.text, block.experts), key=lambda pair: pair[1]):
        text = escape("".join("⏎\n" if character == "\n" else character for character, _ in group))
        pieces.append(text if expert is None else f'<span class="e{expert % len(EXPERT_COLOURS)}">{text}</span>')
    legend = "".join(
        f'<span class="e{expert % len(EXPERT_COLOURS)}">expert {expert}</span>' for expert in range(block.n_expert)
    )
    return (
        f'<div class="passage"><h3>{_inline(block.title)}</h3>\n<pre>{"".join(pieces)}</pre>\n'
        f'<p class="legend">{legend}</p></div>\n'
    )


WRITERS = {Paragraph: _paragraph, Grid: _grid, Picture: _picture, Passage: _passage, Ruling: _ruling}


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
        f'<td class="claim">{_inline(ruling.sentence)}</td>'
        f'<td class="verdict">{_verdict(ruling)}</td>'
        f'<td class="effect">{_inline(ruling.effect)}</td></tr>\n'
        for ruling, anchor in rulings
    )


def _overview(groups, anchor):
    """groups: (section's title, its anchor, its rulings)."""
    bodies = "".join(
        '<tbody>\n<tr class="group"><th colspan="4" scope="rowgroup">'
        f'<a href="#{place}">{_inline(title)}</a></th></tr>\n{_overview_rows(rulings)}</tbody>\n'
        for title, place, rulings in groups
    )
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("Id", "Claim", "Verdict", "Effect"))
    return (
        f'<section><h2 id="{anchor}">{OVERVIEW}</h2>\n<table class="overview" aria-labelledby="{anchor}">\n'
        f"<thead><tr>{heads}</tr></thead>\n{bodies}</table></section>\n"
    )


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
