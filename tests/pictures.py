"""Checks that every picture must pass, and ways to read the numbers of one.

assert_readable(name, drawing.figure, points=8)     no letter is smaller, outside, or on another
assert_stands_alone(name, style.svg(drawing.figure))
in_a_fresh_process("import test_figures as t; print(t.digest())")
"""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.text import Text

from report import style

ROOT = Path(style.__file__).resolve().parents[1]


def assert_readable(name, figure, points):
    """No text is smaller than this, outside the figure, or on another text."""
    seen, draw = [], Text.draw

    def noted(text, renderer, *arguments, **keys):
        if text.get_visible() and text.get_text().strip():
            seen.append((text.get_text(), text.get_window_extent(renderer), text.get_fontsize()))
        return draw(text, renderer, *arguments, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", noted)
        figure.draw_without_rendering()
    assert seen, name
    ground = figure.bbox
    for text, box, size in seen:
        assert size >= points, (name, text)
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= ground.x1 + 1 and box.y1 <= ground.y1 + 1, (name, text)
    for (text, box, _), (other, other_box, _) in combinations(seen, 2):
        width = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
        height = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
        assert width <= 1 or height <= 1, (name, text, other)


def assert_stands_alone(name, text):
    """The text of an SVG: small, in light and dark, and nothing outside is referred to."""
    root = ET.fromstring(text)
    assert root.get("viewBox") and "prefers-color-scheme:dark" in text and "currentColor" in text, name
    # One colour of ink in the sheet, for light; all else that is ink follows the reader's scheme.
    assert text.count(style.INK) == 1 and len(text) < 250_000, name
    for element in root.iter():
        for key, value in element.attrib.items():
            assert not key.endswith("href") or value.startswith("#"), (name, value)
            assert "url(" not in value.replace("url(#", ""), (name, value)
    urls = set(re.findall(r"https?://[^\"' ]+", text))
    assert urls == {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}, name


def in_a_fresh_process(code):
    """The words that this code prints; it can import tests, and sets have another order there."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.split()


def lines_of(axes):
    return [list(zip(*line.get_data())) for line in axes.get_lines()]


def panel_over(drawing, xlabel):
    """The panel whose x axis is called so, or begins so."""
    return next(axes for axes in drawing.figure.axes if axes.get_xlabel().startswith(xlabel))


def panel(drawing, title):
    """The panel whose title begins so."""
    return next(axes for axes in drawing.figure.axes if axes.get_title().replace("\n", " ").startswith(title))


def marks(axes, marker, filled=True):
    """[(x, y)] of what is drawn with this marker."""
    lines = [line for line in axes.get_lines() if line.get_marker() == marker]
    return [point for line in lines if (line.get_fillstyle() == "full") == filled for point in zip(*line.get_data())]
