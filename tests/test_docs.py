"""The README keeps up with the code: its tree, its options, its configs, its commands."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import moe
import sweep
from papers import TABLES
from run.settings import Config
from support.configurator import PAGE_WIDTH, Message
from support.options import EXPERIMENT, choices_of, options_of

ROOT = Path(moe.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = README.partition("## Every option of the MoE layer")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"\b(train|sample|sweep|bench|analyze)\.py\b([^#&;|\n]*)", "\n".join(BLOCKS))
MOE_KEYS = [name for name, option in options_of(Config).items() if option.group == options_of(Config)["n_expert"].group]


def test_the_tree_has_a_line_for_every_module():
    tree = README.partition("## The tree")[2].partition("\n## ")[0]
    modules = [path.name for path in ROOT.glob("*.py")] + [f"data/{path.name}" for path in ROOT.glob("data/[a-z]*.py")]
    assert [name for name in modules if not re.search(rf"^{re.escape(name)} ", tree, re.MULTILINE)] == []


def test_every_table_is_in_the_readme():
    tables = README.partition("## Tables and verdicts")[2].partition("\n## ")[0]
    assert [name for name in TABLES if f"`{name}`" not in tables] == []


@pytest.mark.parametrize("key", MOE_KEYS)
def test_every_moe_key_and_value_is_explained(key):
    """A `_end` or `_schedule` stands beside the key that it belongs to."""
    stem = re.sub(r"_(end|schedule)$", "", key)
    aside = {"n_expert", "expert_top_k", "segment_size", "router_ngram", "n_expert_group"}
    assert key in aside or f"`{stem}" in OPTIONS or f"{stem}`" in OPTIONS, key
    if key == stem:
        rows = " ".join(row for row in OPTIONS.splitlines() if stem in row)
        values = [value for value in choices_of(options_of(Config)[key]) if value not in ("none", "auto")]
        assert [value for value in values if not re.search(rf"\b{value}\b", rows)] == []


def test_every_config_that_the_readme_names_exists():
    named = set(re.findall(r"`((?:shakespeare|enwik8|text8)_\w+)`", README)) - {"shakespeare_char"}
    assert named and [name for name in sorted(named) if not (ROOT / "config" / f"{name}.py").exists()] == []
    for short in set(re.findall(r"`…_(\w+)`", README)) - {"end", "schedule"}:
        assert list((ROOT / "config").glob(f"*_{short}.py")), short


def test_what_may_change_when_a_run_goes_on_is_listed():
    listed = README.partition("**May be changed**")[2].partition("Everything else")[0]
    named = set(re.findall(r"`(\w+)[`…]", listed)) | {"wandb_log", "wandb_project", "wandb_run_name"}
    # Not settings of a run, but what to do with it.
    aside = {"init_from", "overwrite", "eval_only", "always_save_checkpoint"}
    may_change = {name for name, option in options_of(Config).items() if option.scope != EXPERIMENT}
    assert named - {"wandb_"} == may_change - aside


@pytest.mark.parametrize("script, words", COMMANDS, ids=lambda part: part.strip())
def test_a_command_of_the_readme_has_options_that_its_script_takes(script, words, monkeypatch):
    """Of the scripts that take options of ours."""
    monkeypatch.chdir(ROOT)
    words = [word for word in shlex.split(words) if word not in ("--help", "--print-config")]
    with pytest.raises(Message) as caught:
        importlib.import_module(script).main([*words, "--print-config"])
    assert " = " in caught.value.text
    if script == "sweep":
        names, _, handed_on = sweep.divided(words)
        sweep.check_tables(names, "paper")
        sweep.changes_of(handed_on)


@pytest.mark.parametrize("script", sorted({script for script, _ in COMMANDS}))
def test_a_help_page_is_no_wider_than_it_says(script):
    with pytest.raises(Message) as caught:
        importlib.import_module(script).main(["--help"])
    assert [line for line in caught.value.text.splitlines() if len(line) > PAGE_WIDTH] == []
