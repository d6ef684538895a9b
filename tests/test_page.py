"""The page: nothing from a text becomes markup, nothing is fetched, and everyone can read it."""

import itertools
import re
from html.parser import HTMLParser

import pytest

from report import page
from report.blocks import Folded, Grid, Paragraph, Picture, Ruling, Section

EVIL = "<script>alert(1)</script>&\"'><b onload=x>"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><path id="a" d="M0 0h9"/></svg>'
VOID = {"meta", "img"}


class Tree(HTMLParser):
    """What a browser would find; unbalanced tags are an error."""

    def __init__(self, html):
        super().__init__()
        self.open, self.found, self.words = [], [], []  # found: (tag, attributes)
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open  # HTML's own elements do not close themselves
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    def all(self, attribute):
        return [attributes[attribute] for _, attributes in self.found if attribute in attributes]

    def tags(self, *names):
        return [(tag, attributes) for tag, attributes in self.found if tag in names]

    @property
    def names(self):
        return {name for _, attributes in self.found for name in attributes}

    @property
    def text(self):
        return "".join(self.words)


def ruling(id="A1", status="held", **more):
    return Ruling(id, status, "A claim.", "+0.07 nats [+0.06, +0.08]", **more)


def whole(text="text"):
    """A page with every kind of block, each of whose texts is `text`."""
    return page.page(
        text,
        [Paragraph(text)],
        [
            Section(
                text,
                [
                    Grid(text, ["", text], [[text, text], [text, text]], [text]),
                    Picture(SVG, text, text),
                    Ruling(text, "held", text, text, text, text, [text, text], [text], provisional=True),
                    Paragraph(f"`{text}`"),
                    Picture(SVG, text, text),
                    Folded(text, [Paragraph(text)]),
                ],
            ),
            Section(text, [Ruling(text, status, text) for status in page.LOOKS]),
        ],
    )


@pytest.mark.parametrize("text", ["text", EVIL, "`**`", "**a `b** c`", "`a** b` **c", "--x `--y -z`", "[1, 2]", "…"])
def test_no_text_becomes_markup(text):
    tree, plain = Tree(whole(text)), Tree(whole())
    inline = {"code", "b", "span"}
    assert [tag for tag, _ in tree.found if tag not in inline] == [tag for tag, _ in plain.found if tag not in inline]
    assert tree.names == plain.names


def test_escaped_text_is_still_readable():
    tree = Tree(whole(EVIL))
    assert tree.text.count(EVIL) >= 20 and tree.all("alt") == [EVIL, EVIL]


def test_code_and_bold():
    html = page.page("", [Paragraph("a `b<c` **d `e`** `**f**` 2 ** 3 * 4")], [])
    assert "<p>a <code>b&lt;c</code> <b>d <code>e</code></b> <code>**f**</code> 2 ** 3 * 4</p>" in html


def test_a_command_reads_as_it_was_written():
    """Copied from the html, it runs: nothing invisible is put between its letters."""
    command = "python train.py config/a.py --seed=1 '--title=a b' --out_dir=out/a-s1 [0, 1]"
    html = page.page("", [Paragraph(f"`{command}`")], [])
    assert command in Tree(html).text and "<span>--s</span>eed" in html


def test_ids_are_unique_and_every_link_leads_somewhere():
    tree = Tree(whole())
    ids, links = tree.all("id"), tree.all("href")
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[a-z0-9-]+", id) for id in ids)
    assert len(links) > 10 and {link.removeprefix("#") for link in links} <= set(ids)
    assert set(tree.all("aria-labelledby")) <= set(ids)


def test_nothing_is_fetched_and_nothing_runs():
    tree = Tree(whole(EVIL))
    assert all(link.startswith("#") for link in tree.all("href"))
    assert all(source.startswith("data:image/svg+xml;base64,") for source in tree.all("src"))
    assert not tree.tags("script", "link", "iframe", "object", "base", "form")
    assert not [name for name in tree.names if name.startswith("on")]
    style = page.COLOURS + page.LAYOUT
    assert "url(" not in style and "@import" not in style and "<" not in style


def test_the_same_blocks_give_the_same_bytes():
    assert whole() == whole()


@pytest.mark.parametrize("status", page.LOOKS)
def test_a_verdict_is_a_word_and_a_shape_in_list_and_detail(status):
    html = page.page("", [], [Section("S", [ruling(status=status)])])
    body = html.partition("<main>")[2]
    assert len(re.findall(rf"<svg.+?</svg>{status}", body)) == 2
    shapes = [shape for _, shape in page.LOOKS.values()]
    assert len({re.sub("var.*?[)]", "", shape) for shape in shapes}) == len(shapes) and "<text" not in "".join(shapes)


def test_a_provisional_verdict_says_so_wherever_it_is():
    sections = [Section("S", [ruling("A1", provisional=True), ruling("A2")])]
    header, _, body = page.page("", [], sections).partition("<main>")
    assert "<b>2</b>" in header and "1 provisional" in header and body.count("provisional") == 2


def test_the_list_of_verdicts_says_where_a_claim_holds():
    html = page.page("", [], [Section("S", [ruling(bounds="> 1.2 ×"), ruling("A2")])])
    assert html.count("A claim. <small>holds if &gt; 1.2 ×</small></td>") == html.count("holds if") == 1


def test_verdicts_are_counted_over_all_sections_and_listed_under_theirs():
    sections = [
        Section("One", [ruling("A1"), ruling("A2", "not run")]),
        Section("None", [Paragraph("no claims")]),
        Section("Two", [ruling("A1")]),
    ]
    html = page.page("", [], sections)
    assert [int(count) for count in re.findall(r"<b>(\d+)</b>", html)] == [2, 0, 0, 1]
    overview = html.partition('<table class="overview"')[2].partition("</section>")[0]
    listed, _, folded = overview.partition("<details><summary>1 not run</summary>")
    assert re.findall(r'href="#([^"]+)"', listed) == ["one", "claim-a1", "two", "claim-a1-2"]
    assert re.findall(r'href="#([^"]+)"', folded) == ["one", "claim-a2"]


def test_folded_blocks_stand_behind_their_title():
    html = page.page("", [], [Section("S", [Folded("a <title>", [ruling("A1", "not run")])])])
    inside = html.partition("<details><summary>a &lt;title&gt;</summary>")[2].partition("</details>")[0]
    assert 'id="claim-a1"' in inside


def test_an_unknown_status_is_refused():
    with pytest.raises(KeyError):
        page.page("", [], [Section("S", [ruling(status="perhaps")])])


def test_a_row_with_the_wrong_number_of_cells_is_refused():
    with pytest.raises(AssertionError, match="T: a row"):
        page.page("", [Grid("T", ["a", "b"], [["1"]])], [])


def test_every_picture_has_a_number_a_caption_and_an_alt():
    tree = Tree(whole("text"))
    assert tree.all("alt") == ["text", "text"] and tree.text.count("Figure 1. text") == 1
    assert tree.text.count("Figure 2. text") == 1 and len(tree.tags("figcaption")) == len(tree.tags("figure")) == 2


def test_a_picture_without_dark_colours_stands_on_white():
    own = SVG.replace("<path", "<style>@media (prefers-color-scheme: dark) {path {stroke: #fff}}</style><path")
    for svg, plate in ((SVG, True), (own, False)):
        assert ('class="plate"' in page.page("", [Picture(svg, "", "")], [])) == plate


def test_tables_have_captions_and_scopes():
    tree = Tree(whole())
    assert len(tree.tags("caption")) == 1 and {attributes["scope"] for _, attributes in tree.tags("th")} == {
        "col",
        "row",
        "rowgroup",
    }


def test_headings_are_in_order():
    levels = [int(tag[1]) for tag, _ in Tree(whole()).tags("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels))


def test_the_head_declares_charset_language_and_viewport():
    page = whole()
    assert page.startswith('<!doctype html>\n<html lang="en">') and "<title>text</title>" in page
    assert '<meta charset="utf-8">' in page and 'content="width=device-width, initial-scale=1"' in page


def test_empty_lists_are_a_page():
    tree = Tree(page.page("T", [], []))
    assert not tree.tags("nav", "table", "ul") and "T" in tree.text
    Tree(page.page("T", [], [Section("S", []), Section("S", [Grid("", [], []), Grid("", ["a"], [])])]))


def luminance(colour):
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("palette", [page.LIGHT, page.DARK], ids=["light", "dark"])
def test_every_text_colour_can_be_read_on_every_background(palette):
    """WCAG 2 AA: 4.5 for text of any size."""
    grounds, lines = {"paper", "panel"}, {"line"}
    texts = set(palette) - grounds - lines
    used = set(re.findall(r"[^-]color: var\(--(\w+)\)", page.LAYOUT)) - {"status"}
    assert used | {colour for colour, _ in page.LOOKS.values()} == texts
    assert set(re.findall(r"background: var\(--(\w+)\)", page.LAYOUT)) == grounds
    for text, ground in itertools.product(texts, grounds):
        bright, dim = sorted((luminance(palette[text]), luminance(palette[ground])), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, ground)


def test_nothing_on_a_screen_is_smaller_than_15_px():
    screen = page.LAYOUT.partition("@media print")[0]
    sizes = re.findall(r"(?:font-size|font): (?:max\()?([\d.]+)(\w+)", screen)
    assert len(sizes) > 5 and all(unit == "rem" and float(size) * 16 >= 15 for size, unit in sizes)


def test_paper_is_light_and_does_not_scroll():
    style = page.COLOURS + page.LAYOUT
    assert (
        style.count("prefers-color-scheme: dark") == style.count("@media screen and (prefers-color-scheme: dark)") == 2
    )
    paper = page.LAYOUT.partition("@media print")[2]
    assert ".scroll { overflow: visible;" in paper
    assert "figure, tr, .ruling, .counts { break-inside: avoid; page-break-inside: avoid; }" in paper
