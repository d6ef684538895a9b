"""README.md and docs/ keep up with the code: commands, options, tables, folders, links."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import sweep
from papers import TABLES
from run.settings import Config
from support.configurator import Message
from support.files import ROOT
from support.options import choices_of, options_of

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests/README.md")
}
OPTIONS = PAGES["docs/moe-options.md"]
BLOCKS = [block for page in PAGES.values() for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)]
COMMANDS = re.findall(r"\b(train|sample|sweep|bench|analyze)\.py\b([^#&;|\n]*)", "\n".join(BLOCKS))
MOE_KEYS = [name for name, option in options_of(Config).items() if option.group == options_of(Config)["n_expert"].group]


@pytest.mark.parametrize("script, words", sorted(set(COMMANDS)), ids=lambda part: part.strip())
def test_a_command_has_options_that_its_script_takes(script, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(words) if word not in ("--help", "--print-config")]
    with pytest.raises(Message) as caught:
        importlib.import_module(script).main([*words, "--print-config"])
    assert " = " in caught.value.text
    if script == "sweep":
        names, _, handed_on = sweep.split_words(words)
        sweep.check_tables(names, "paper")
        sweep.changes_of(handed_on)


@pytest.mark.parametrize("key", MOE_KEYS)
def test_every_moe_key_and_value_has_a_row(key):
    """A `_end` or `_schedule` stands beside the key that it belongs to."""
    stem = re.sub(r"_(end|schedule)$", "", key)
    assert f"`{stem}" in OPTIONS, key
    if key == stem:
        rows = " ".join(row for row in OPTIONS.splitlines() if stem in row)
        values = [value for value in choices_of(options_of(Config)[key]) if value not in ("none", "auto")]
        assert [value for value in values if not re.search(rf"\b{value}\b", rows)] == []


def test_every_config_that_a_page_names_exists():
    named = set(re.findall(r"`((?:shakespeare|enwik8|text8)_\w+)`", " ".join(PAGES.values()))) - {"shakespeare_char"}
    assert named and [name for name in sorted(named) if not (ROOT / "config" / f"{name}.py").exists()] == []


def test_every_table_is_named():
    assert [name for name in TABLES if f"`{name}`" not in PAGES["docs/results-and-verdicts.md"]] == []


def test_every_folder_and_script_stands_in_the_tree():
    tree = PAGES["README.md"].partition("## The tree")[2].partition("\n## ")[0]
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    wanted = folders | {"config/", "docs/", "results/", "tests/"} | {path.name for path in ROOT.glob("*.py")}
    assert [name for name in sorted(wanted) if not re.search(rf"(?<![\w/]){re.escape(name)}", tree)] == []


def anchors(text):
    """The ids that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(Path(target).read_text(encoding="utf-8")), link
