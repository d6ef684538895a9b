"""Configuration: one typed `Config`, config files in Python, and `--key=value`.

    config = parse(Config, sys.argv[1:])      # train.py config/shakespeare_moe4.py config/cpu.py --seed=2

- Files and options apply from left to right: the last word on a key counts.
- A config file is Python with plain assignments. It may begin with `from config.shakespeare_dense import *` and
  change what differs; the first line of its docstring is the run's title. The imported files run afresh every time:
  nothing enters `sys.modules`, no bytecode is kept, so what counts is what the files say now.
- Every problem is found before any is told: unknown keys, wrong types, values out of range, impossible combinations,
  each with where it came from (`config/foo.py:12`, `--n_head=5`), what was expected and the nearest key.
- `parse` works for any dataclass whose fields are made with `option`; `Config`, at the end, is the one for training.
- `--help` and `--print-config` are raised as a `Message`, which a script prints before it exits 0.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

ROOT = Path(__file__).resolve().parent
PAGE_WIDTH = 100  # columns of --help

# Each key has a scope, which says what a different value means:
EXPERIMENT = "experiment"  # another result: in the hash, must match when a run is resumed
SCHEDULE = "schedule"  # a longer or finer look at the same run: in the hash, may change on resume
MACHINE = "machine"  # where and how the run is made: not in the hash
SCOPES = (EXPERIMENT, SCHEDULE, MACHINE)


class ConfigError(ValueError):
    """What is wrong with a configuration: `problems` holds all of it, one line each."""

    def __init__(self, problems: Iterable[str]):
        self.problems = [" ".join(problem.split()) for problem in problems]
        super().__init__("\n".join(self.problems))


class Message(Exception):
    """What the user asked to read (--help, --print-config): the script prints `text` and exits 0."""

    def __init__(self, text: str):
        self.text = text
        super().__init__(text)


# ---------------------------------------------------------------------------------------------------------------------
# Options: the fields of a dataclass as parser, checks and help see them


@dataclass(frozen=True)
class Option:
    """One key. `kinds` are the types it may have: bool, int, float, str, or a Literal of strings."""

    name: str
    kinds: tuple
    default: Any
    help: str
    group: str
    scope: str
    at_least: float | None
    at_most: float | None
    below: float | None


def option(
    default: Any,
    help: str,
    *,
    group: str = "Options",
    scope: str = MACHINE,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that `parse` understands; its annotation gives the type, and the choices as a Literal."""
    assert scope in SCOPES, scope
    about = dict(help=help, group=group, scope=scope, at_least=at_least, at_most=at_most, below=below)
    return dataclasses.field(default=default, metadata=about)


def options_of(cls: type) -> dict[str, Option]:
    """The options of a dataclass by name, in the order in which it declares them."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: Option(field.name, union_members(hints[field.name]), field.default, **field.metadata)
        for field in dataclasses.fields(cls)
    }


def union_members(annotation: Any) -> tuple:
    """The types that an annotation allows: `bool | Literal["auto"]` has two, a plain type is its only one."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def choices_of(option: Option) -> list[str]:
    """The strings that the Literal types of an option list; none for other types."""
    return [choice for kind in option.kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind)]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that looks most like `word`, if any does."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


# ---------------------------------------------------------------------------------------------------------------------
# Values: one rule for what a type accepts, from a file or from the command line


def accept_value(kind: Any, value: Any) -> Any:
    """`value` as a value of `kind`, or ValueError: an integer is a fine float, a bool is no number, text is neither."""
    if typing.get_origin(kind) is Literal:
        if type(value) is str and value in typing.get_args(kind):
            return value
    elif kind is float and type(value) in (int, float):
        if math.isfinite(value):
            return float(value)
    elif kind is int and type(value) is float and value.is_integer():
        return int(value)  # max_iters = 1e5
    elif type(value) is kind:
        return value
    raise ValueError


def accept_text(kind: Any, text: str) -> Any:
    """What the command line's `text` means for a `kind`, or ValueError."""
    readers = {bool: bool_from_text, int: int_from_text, float: float}
    return accept_value(kind, readers.get(kind, unquoted)(text))


def bool_from_text(text: str) -> bool:
    word = text.lower()
    if word in ("true", "yes", "1"):
        return True
    if word in ("false", "no", "0"):
        return False
    raise ValueError


def int_from_text(text: str) -> int | float:
    """5, 1_000 and 1e5; a float that is no integer is for `accept_value` to refuse."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def unquoted(text: str) -> str:
    """--dataset='text8' reaches us with its quotes when no shell has taken them off."""
    quoted = len(text) >= 2 and text[0] in "'\"" and text[-1] == text[0] and text[0] not in text[1:-1]
    return text[1:-1] if quoted else text


def fitted(option: Option, raw: Any, accept: Callable[[Any, Any], Any]) -> Any:
    """`raw` as the first of the option's kinds that accepts it within the option's range; ValueError if none does."""
    for kind in option.kinds:
        try:
            value = accept(kind, raw)
        except (ValueError, OverflowError):
            continue
        if in_range(option, value):
            return value
    raise ValueError


def in_range(option: Option, value: Any) -> bool:
    if isinstance(value, (bool, str)):
        return True
    return (
        (option.at_least is None or value >= option.at_least)
        and (option.at_most is None or value <= option.at_most)
        and (option.below is None or value < option.below)
    )


def expectation(option: Option) -> str:
    """What a value of the option must be, in words."""
    limits = ", ".join(
        f"{preposition} {limit}"
        for preposition, limit in (("from", option.at_least), ("up to", option.at_most), ("below", option.below))
        if limit is not None
    )
    names = {bool: "True or False", int: f"an integer {limits}", float: f"a number {limits}", str: "text"}
    words = [names[kind].strip() for kind in option.kinds if kind in names]
    words += [repr(choice) for choice in choices_of(option)]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def shown(value: Any) -> str:
    """A value as a problem quotes it: on one line, and not for pages."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Config files


@dataclass(frozen=True)
class ConfigFile:
    """A config file that has run: its title, its names' values, and where each was assigned (`config/foo.py:12`)."""

    path: Path
    title: str
    values: dict[str, Any]
    origins: dict[str, str]


def run_file(path: Path, importers: tuple[Path, ...] = ()) -> ConfigFile:
    """Runs the config file in a namespace of its own; `importers` are the files whose imports led here.

    Raises ConfigError, with one problem, when the file cannot be read, is no Python, or fails while it runs.
    """
    name = shown_path(path)
    if path in importers:
        raise ConfigError([f"{name}: imports itself by way of {shown_path(importers[-1])}; expected plain bases"])
    tree, code = compiled(path)
    bases: dict[str, ConfigFile] = {}
    import_ = functools.partial(import_base, path, importers, bases)
    namespace = {
        "__name__": path.stem,
        "__file__": str(path),
        "__builtins__": {**vars(builtins), "__import__": import_},
    }
    try:
        exec(code, namespace)
    except ConfigError:
        raise  # a base's problem: it already says where
    except (Exception, SystemExit) as error:
        problem = f"{name}:{failing_line(error, path)}: {type(error).__name__}: {error}"
        raise ConfigError([problem]) from None
    title = (ast.get_docstring(tree) or "").partition("\n")[0]
    values = {key: value for key, value in namespace.items() if not key.startswith("_")}
    return ConfigFile(path, title, values, assignment_origins(tree, path, bases))


def compiled(path: Path) -> tuple[ast.Module, types.CodeType]:
    """The file as a syntax tree (for line numbers) and as code; ConfigError when it is not readable Python."""
    name = shown_path(path)
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
        # Without dont_inherit the file would get this module's `from __future__ import annotations`.
        return tree, compile(tree, str(path), "exec", dont_inherit=True)
    except FileNotFoundError:
        problem = f"{name}: no such file; expected the path of a config file{nearest_file(path)}"
    except IsADirectoryError:
        problem = f"{name}: is a folder; expected the path of a config file{nearest_file(path)}"
    except OSError as error:
        problem = f"{name}: cannot be read ({error.strerror}); expected the path of a config file"
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        text = f": {error.text.strip()}" if error.text else ""
        problem = f"{name}{line}: syntax error, {error.msg}{text}; expected Python"
    raise ConfigError([problem])


def import_base(
    path: Path,
    importers: tuple[Path, ...],
    bases: dict[str, ConfigFile],
    name: str,
    globals: dict | None = None,
    locals: dict | None = None,
    fromlist: Iterable[str] | None = (),
    level: int = 0,
) -> types.ModuleType:
    """`__import__` as the config file at `path` sees it: config files run afresh, and all else is imported as ever.

    `config.…` is looked for beside this module, from whatever folder the user calls us; other names beside `path`.
    """
    ours = name.partition(".")[0] == "config" and level == 0
    base = (ROOT if ours else path.parent) / (name.replace(".", "/") + ".py")
    if ours and not (fromlist and base.is_file()):
        raise ImportError(f"expected `from config.NAME import *`{nearest_file(base)}")
    if level or not base.is_file() or ("." in name and not fromlist):
        return builtins.__import__(name, globals, locals, fromlist, level)
    bases[name] = run_file(base, (*importers, path))
    module = types.ModuleType(name)
    module.__dict__.update(bases[name].values)
    return module


def assignment_origins(tree: ast.Module, path: Path, bases: dict[str, ConfigFile]) -> dict[str, str]:
    """Where each name of the file got its last value: a line of the file, or of the base that it imported."""
    origins: dict[str, str] = {}
    for statement in tree.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and node.module in bases:
                origins.update(bases[node.module].origins)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                origins[node.id] = f"{shown_path(path)}:{node.lineno}"
    return origins


def failing_line(error: BaseException, path: Path) -> int:
    """The last line of the file that was running when the error came."""
    line, step = 0, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            line = step.tb_lineno
        step = step.tb_next
    return line


def shown_path(path: Path) -> str:
    """The path from the current folder when it lies there, else in full."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def nearest_file(path: Path) -> str:
    """`; nearest: …` for a config file whose name looks like that of `path`; empty when there is none."""
    folders = [ROOT / "config"] + ([path.parent] if path.parent != ROOT else [])
    known = {file.stem: file for folder in folders for file in sorted(folder.glob("*.py"))}
    match = nearest(path.stem, known)
    return f"; nearest: {shown_path(known[match])}" if match else ""


# ---------------------------------------------------------------------------------------------------------------------
# From arguments to an instance


def parse(cls: type, argv: list[str], *, usage: str = "", description: str = "") -> Any:
    """An instance of the dataclass `cls` from command-line arguments (without the program's name).

    Every field of `cls` is made with `option`. The class may have
    - `takes_files = True` (a ClassVar): arguments that are no options are config files;
    - `problems(self)`: yields (keys, message) for each combination of keys that cannot be;
    - `completed(self, files)`: the instance with the values that follow from its ConfigFiles.

    Raises ConfigError with all problems at once, and Message for --help and --print-config.
    """
    if "--help" in argv or "-h" in argv:
        raise Message(help_page(cls, usage, description))
    reading = Reading(options_of(cls))
    read_arguments(reading, [a for a in argv if a != "--print-config"], getattr(cls, "takes_files", False))
    instance = reading.finish(cls)
    completed = instance.completed(reading.files) if hasattr(cls, "completed") else instance
    if "--print-config" in argv:
        derived = [name for name in reading.options if getattr(completed, name) != getattr(instance, name)]
        raise Message(config_page(completed, reading.options, reading.origins | dict.fromkeys(derived, "derived")))
    return completed


class Reading:
    """The assignments met so far, each with its origin, and every problem found on the way."""

    def __init__(self, options: dict[str, Option]):
        self.options = options
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.files: list[ConfigFile] = []
        self.problems: list[str] = []
        self.broken: set[str] = set()  # keys without a trustworthy value: no combination is judged by them
        self.file_failed = False  # then no key's value is known

    def assign(self, name: str, raw: Any, origin: str, accept: Callable[[Any, Any], Any]) -> None:
        """Takes `raw` as the key's value, read by `accept` (`accept_text` or `accept_value`), or notes the problem."""
        if name not in self.options:
            self.refuse_unknown(name, origin)
            return
        option = self.options[name]
        try:
            self.values[name] = fitted(option, raw, accept)
        except ValueError:
            guess = nearest(raw, choices_of(option)) if isinstance(raw, str) else None
            hint = f"; nearest: {guess!r}" if guess else ""
            self.refuse(f"{origin}: {name} is {shown(raw)}; expected {expectation(option)}{hint}", name)
        else:
            self.origins[name] = origin
            self.broken.discard(name)

    def refuse(self, problem: str, name: str) -> None:
        self.problems.append(problem)
        self.broken.add(name)

    def refuse_unknown(self, name: str, origin: str) -> None:
        guess = nearest(name, (*self.options, "help", "print-config"))
        hint = f"nearest key: {guess}" if guess else "--help lists the keys"
        self.refuse(f"{origin}: unknown key {name!r}; {hint}", guess or name)

    def finish(self, cls: type) -> Any:
        """The instance, once its combinations have been checked too; ConfigError with all that was wrong."""
        instance = cls(**self.values)
        if hasattr(cls, "problems") and not self.file_failed:
            self.problems += [
                f"{self.origin_of(keys)}: {message}"
                for keys, message in instance.problems()
                if not self.broken.intersection(keys)
            ]
        if self.problems:
            raise ConfigError(self.problems)
        return instance

    def origin_of(self, keys: Iterable[str]) -> str:
        """Where the keys were set; those at their default go without saying, unless all are."""
        origins = dict.fromkeys(self.origins[key] for key in keys if key in self.origins)
        return ", ".join(origins) or "default"


def read_arguments(reading: Reading, argv: list[str], takes_files: bool) -> None:
    """Applies the arguments to the reading, from left to right."""
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        name, equals, text = argument.lstrip("-").partition("=")
        if argument.startswith("--") and equals:
            reading.assign(name, text, argument, accept_text)
        elif argument.startswith("--"):
            read_bare(reading, name, waiting)
        elif argument.startswith("-") or (equals and not argument.endswith(".py")):
            reading.refuse(f"{argument}: expected {'--' + name + equals + text if equals else '--key=value'}", name)
        elif takes_files:
            read_file(reading, Path(os.path.abspath(argument)))
        else:
            reading.problems.append(f"{argument}: expected --key=value; no config files are taken here")


def read_bare(reading: Reading, name: str, waiting: list[str]) -> None:
    """`--flag` sets a bool; `--key value` is told to use `=`, and its value is not taken for a file."""
    option = reading.options.get(name)
    if option is None:
        reading.refuse_unknown(name, f"--{name}")
        return
    following = waiting[0] if waiting and not waiting[0].startswith("--") else None
    if following is not None and is_meant_as_value(option, following):
        waiting.pop(0)
        reading.refuse(f"--{name} {following}: expected --{name}={following}", name)
    elif bool in option.kinds:
        reading.assign(name, True, f"--{name}", accept_value)
    else:
        reading.refuse(f"--{name}: has no value; expected --{name}=VALUE, {expectation(option)}", name)


def is_meant_as_value(option: Option, following: str) -> bool:
    """Whether the argument after a bare --key is its value: after a flag, only what the flag would accept."""
    if bool not in option.kinds:
        return not following.endswith(".py")
    try:
        fitted(option, following, accept_text)
    except ValueError:
        return False
    return True


def read_file(reading: Reading, path: Path) -> None:
    """Runs a config file and takes its names as keys: all but modules, functions and classes, which help it along."""
    try:
        file = run_file(path)
    except ConfigError as error:
        reading.problems += error.problems
        reading.file_failed = True
        return
    reading.files.append(file)
    for name, value in file.values.items():
        # `seed = max` is a mistake and not a helper, so a helper's name must be no key.
        if name in reading.options or not (callable(value) or isinstance(value, types.ModuleType)):
            reading.assign(name, value, file.origins.get(name, shown_path(path)), accept_value)


# ---------------------------------------------------------------------------------------------------------------------
# Pages to read


def help_page(cls: type, usage: str, description: str) -> str:
    """--help: every key with its default, type and one line of help, by group."""
    takes_files = getattr(cls, "takes_files", False)
    usage = usage or ("[config/FILE.py ...] " if takes_files else "") + "[--key=value ...]"
    options = options_of(cls)
    settings = {name: f"  --{name}={option.default or repr(option.default)}" for name, option in options.items()}
    setting_width = max(map(len, settings.values())) + 2
    type_width = max(len(type_name(option)) for option in options.values()) + 2
    lines = [f"usage: {usage}", ""]
    for line in [*description.strip().splitlines(), ""] if description else []:
        lines += textwrap.wrap(line, PAGE_WIDTH) or [""]
    lines += ["The last word on a key counts, from left to right. Shown are the defaults."]
    lines += ["--help shows this page, --print-config the resolved values and where each came from."]
    for group, members in by_group(options):
        lines += ["", group]
        for option in members:
            start = settings[option.name].ljust(setting_width) + type_name(option).ljust(type_width)
            lines += help_rows(start, option)
    return "\n".join(lines)


def help_rows(start: str, option: Option) -> list[str]:
    """The lines of one key: `start`, then the help, wrapped in a column of its own."""
    choices = choices_of(option) if len(option.kinds) == 1 else []
    text = option.help + (f" {{{', '.join(choices)}}}" if choices else "")
    rows = textwrap.wrap(text, PAGE_WIDTH - len(start))
    return [(start if i == 0 else " " * len(start)) + row for i, row in enumerate(rows)]


def type_name(option: Option) -> str:
    """int, bool, choice, …; where there are several kinds, the choices by name: bool|auto."""
    if len(option.kinds) == 1 and choices_of(option):
        return "choice"
    return "|".join([kind.__name__ for kind in option.kinds if isinstance(kind, type)] + choices_of(option))


def by_group(options: dict[str, Option]) -> Iterator[tuple[str, list[Option]]]:
    """The options of each group, groups in the order in which they first appear."""
    for group in dict.fromkeys(option.group for option in options.values()):
        yield group, [option for option in options.values() if option.group == group]


def config_page(instance: Any, options: dict[str, Option], origins: dict[str, str]) -> str:
    """--print-config: the resolved values with their origins; the page is itself a config file."""
    settings = {name: f"{name} = {getattr(instance, name)!r}" for name in options}
    width = min(40, max(map(len, settings.values())))
    lines = []
    for group, members in by_group(options):
        lines += ["", f"# {group}"]
        for option in members:
            origin = " ".join(origins.get(option.name, "default").split())
            lines.append(f"{settings[option.name].ljust(width)}  # {origin}")
    return "\n".join(lines[1:])


# ---------------------------------------------------------------------------------------------------------------------
# The configuration of a training run

run_key = functools.partial(option, group="Run")
data_key = functools.partial(option, group="Data")
model_key = functools.partial(option, group="Model", scope=EXPERIMENT)
moe_key = functools.partial(option, group="Mixture of experts", scope=EXPERIMENT)
optimiser_key = functools.partial(option, group="Optimiser", scope=EXPERIMENT)
evaluation_key = functools.partial(option, group="Evaluation", scope=SCHEDULE)
machine_key = functools.partial(option, group="Machine")

Problem = tuple[tuple[str, ...], str]  # the keys that do not go together, and why


@dataclass(frozen=True)
class Config:
    """Every key of a run. Built in Python it is taken as it stands; `parse` and `from_dict` check it."""

    takes_files: ClassVar[bool] = True

    title: str = run_key("", "name of the run in tables and figures; empty = the config files' own titles")
    out_dir: str = run_key("", "folder of the run; empty = out/<config names>-s<seed>")
    seed: int = run_key(
        1337, "seed of weights, batches, dropout and routing noise", scope=EXPERIMENT, at_least=0, at_most=2**32 - 1
    )
    init_from: Literal["scratch", "resume"] = run_key("scratch", "start anew, or go on from the ckpt.pt in out_dir")
    overwrite: bool = run_key(False, "replace the run that out_dir holds")
    eval_only: bool = run_key(False, "evaluate once, and do not train")
    always_save_checkpoint: bool = run_key(
        True,
        "accepted for nanoGPT's configs, without effect: ckpt.pt is saved at every evaluation in any case, "
        "best.pt when the validation loss improves",
    )
    wandb_log: bool = run_key(False, "log to Weights & Biases as well")
    wandb_project: str = run_key("charmoe", "its project")
    wandb_run_name: str = run_key("", "its name for the run; empty = the title")

    dataset: str = data_key(
        "shakespeare_char", "folder under data/, or the path of a prepared folder", scope=EXPERIMENT
    )
    prepare: bool = data_key(True, "download and encode the data set when it is not there yet")
    batch_size: int = data_key(64, "sequences a step, before accumulation", scope=EXPERIMENT, at_least=1)
    block_size: int = data_key(256, "context length in characters", scope=EXPERIMENT, at_least=1)
    gradient_accumulation_steps: int = data_key(
        1, "batches whose gradients make one step", scope=EXPERIMENT, at_least=1
    )

    n_layer: int = model_key(6, "blocks", at_least=1)
    n_head: int = model_key(6, "attention heads a block; must divide n_embd", at_least=1)
    n_embd: int = model_key(384, "width of the residual stream; a dense MLP's hidden width is 4 times it", at_least=1)
    dropout: float = model_key(0.2, "share of activations that training drops; 0 = none", at_least=0, below=1)
    bias: bool = model_key(False, "biases in linear layers and layer norms")
    mlp_hidden: int = model_key(0, "hidden width of a dense MLP; 0 = 4 n_embd", at_least=0)

    n_expert: int = moe_key(0, "experts an MoE block; 0 = a dense MLP in every block", at_least=0)
    expert_top_k: int = moe_key(1, "experts a character goes to; 0 = all of them (soft routing)", at_least=0)
    expert_hidden: int = moe_key(
        0,
        "hidden width of one expert; 0 = 4 n_embd for mlp, and 4 n_embd / n_expert for the linear kinds, "
        "whose experts then add up to the dense MLP's width",
        at_least=0,
    )
    expert_kind: Literal["mlp", "linear_concat", "linear_sum"] = moe_key(
        "mlp",
        "mlp: an expert is a whole MLP; linear_concat, linear_sum: it is one linear layer, and the gated outputs are "
        "set side by side, or added, before one GELU and one output layer",
    )
    moe_every: int = moe_key(1, "every n-th block is an MoE block; 1 = all, 2 = the 2nd, 4th, ...", at_least=1)
    n_expert_by_block: str = moe_key(
        "", "experts of each block, as 8,8,4,4 (0 = dense; moe_every has no say); empty = n_expert in every MoE block"
    )
    n_shared_expert: int = moe_key(0, "experts that every character goes through as well, ungated", at_least=0)
    share_experts: bool = moe_key(False, "one set of experts for all MoE blocks; each block keeps its own router")
    expert_init: Literal["gpt2", "switch", "sigma_moe"] = moe_key(
        "gpt2",
        "initial scale; gpt2: as the dense MLP's; switch: a tenth of the usual; sigma_moe: as their total width's",
    )
    expert_inner_dropout: float = moe_key(
        0.0, "share of the experts' hidden activations that training drops", at_least=0, below=1
    )

    router: Literal["learned", "frozen", "random", "hash", "ngram_hash", "two_level", "expert_choice"] = moe_key(
        "learned",
        "how experts are scored: trained; frozen at, or re-drawn from, a random start; by a hash of the character or "
        "of the last ones; a group, then experts in it; or experts choose characters (not causal)",
    )
    router_ngram: int = moe_key(3, "ngram_hash: how many characters are hashed", at_least=1)
    n_expert_group: int = moe_key(2, "two_level: groups of experts", at_least=1)
    router_level: Literal["token", "segment", "prefix", "sequence"] = moe_key(
        "token",
        "what is routed by: each character; the mean of the segment before its own; the mean so far; "
        "the whole sequence's mean (not causal)",
    )
    segment_size: int = moe_key(16, "segment: its characters", at_least=1)
    router_top_p: float = moe_key(
        0.0, "use only as many of the top_k as reach this probability; 0 = always top_k", at_least=0, at_most=1
    )
    gate: Literal["softmax", "sigmoid"] = moe_key("softmax", "how logits become gates")
    gate_renormalize: bool = moe_key(
        False, "make the chosen experts' gates add up to 1; with softmax that is softmax over the chosen logits alone"
    )
    gate_straight_through: bool = moe_key(
        False, "top-1: multiply by 1, and let the gradient pass as if by the probability"
    )
    router_jitter: float = moe_key(
        0.0, "in training, the router's input times U(1 - x, 1 + x); 0 = off, 0.01 is usual", at_least=0, below=1
    )
    router_temperature: float = moe_key(1.0, "logits are divided by it", at_least=1e-3)
    router_temperature_end: float = moe_key(1.0, "its value after the last step", at_least=1e-3)
    router_temperature_schedule: Literal["constant", "linear", "cosine"] = moe_key("constant", "the way there")
    expert_dropout: float = moe_key(
        0.0, "in training, an expert is masked for a character with this probability", at_least=0, below=1
    )
    expert_dropout_end: float = moe_key(0.0, "its value after the last step", at_least=0, below=1)
    expert_dropout_schedule: Literal["constant", "linear", "cosine"] = moe_key("constant", "the way there")
    capacity_factor: float = moe_key(
        0.0, "an expert takes at most this times its even share of characters; 0 = no limit, none dropped", at_least=0
    )
    capacity_group: Literal["sequence", "batch"] = moe_key(
        "sequence", "what shares a capacity: one sequence, or the whole batch (which is then not causal)"
    )
    aux_loss: Literal["switch", "cv2", "none"] = moe_key(
        "switch",
        "balancing loss; switch: n_expert x sum of load x probability, 1 a layer when even; "
        "cv2: variance / mean^2 of the experts' gate sums, 0 when even",
    )
    aux_loss_coef: float = moe_key(0.01, "weight of the balancing loss; 0 = off", at_least=0)
    aux_loss_coef_end: float = moe_key(0.0, "its value after the last step", at_least=0)
    aux_loss_coef_schedule: Literal["constant", "linear", "cosine"] = moe_key("constant", "the way there")
    aux_loss_reduction: Literal["sum", "mean"] = moe_key("sum", "how the layers' auxiliary losses are combined")
    z_loss_coef: float = moe_key(
        0.0, "weight of the router's z-loss, mean(logsumexp(logits)^2); 0 = off, 0.001 is usual", at_least=0
    )
    router_bias_rate: float = moe_key(
        0.0,
        "balancing without a loss: step of the bias by which experts are chosen; 0 = off, 0.001 is usual",
        at_least=0,
    )
    moe_backend: Literal["auto", "reference", "masked", "sorted"] = moe_key(
        "auto", "how the experts are computed: the same result at another speed", scope=MACHINE
    )

    learning_rate: float = optimiser_key(1e-3, "AdamW's step size after warm-up", at_least=0)
    max_iters: int = optimiser_key(5000, "training steps", scope=SCHEDULE, at_least=1)
    weight_decay: float = optimiser_key(0.1, "AdamW's decay of the weight matrices; 0 = none", at_least=0)
    beta1: float = optimiser_key(0.9, "AdamW's memory of the gradient", at_least=0, below=1)
    beta2: float = optimiser_key(0.99, "AdamW's memory of the squared gradient", at_least=0, below=1)
    grad_clip: float = optimiser_key(1.0, "largest norm of the gradient; 0 = not clipped", at_least=0)
    decay_lr: bool = optimiser_key(True, "warm up, then decay by a cosine; False = constant learning_rate")
    warmup_iters: int = optimiser_key(100, "steps of linear warm-up; may be more than max_iters", at_least=0)
    lr_decay_iters: int = optimiser_key(0, "step at which min_lr is reached; 0 = max_iters", scope=SCHEDULE, at_least=0)
    min_lr: float = optimiser_key(1e-4, "learning rate at the end of the cosine", at_least=0)

    eval_interval: int = evaluation_key(250, "steps from one evaluation to the next", at_least=1)
    eval_iters: int = evaluation_key(200, "random batches a split for the papers' way to measure", at_least=1)
    log_interval: int = evaluation_key(10, "steps from one logged training loss to the next", scope=MACHINE, at_least=1)

    device: str = machine_key("auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = machine_key("auto", "arithmetic of the matrix products")
    compile: bool | Literal["auto"] = machine_key("auto", "torch.compile: True, False, or auto: where it pays")

    def problems(self) -> Iterator[Problem]:
        """Each combination of keys that cannot be, with the way out."""
        if self.n_embd % self.n_head:
            yield ("n_embd", "n_head"), f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}"
        if self.decay_lr and self.min_lr > self.learning_rate:
            message = f"min_lr = {self.min_lr} is more than learning_rate = {self.learning_rate}"
            yield ("min_lr", "learning_rate", "decay_lr"), f"{message}; expected at most that, or decay_lr=False"
        if not self.dataset:
            yield ("dataset",), "dataset is empty; expected a folder under data/, or a path"
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            guess = nearest(self.device, ("auto", "cpu", "cuda", "mps"))
            hint = f"; nearest: {guess}" if guess else ""
            yield ("device",), f"device is {self.device!r}; expected auto, cpu, cuda, cuda:N or mps{hint}"
        if self.n_expert:
            yield from self.moe_problems()
        elif self.n_expert_by_block.strip():
            message = "n_expert_by_block is set, but n_expert = 0 means a dense model"
            yield ("n_expert_by_block", "n_expert"), f"{message}; set n_expert to the largest of its numbers"

    def moe_problems(self) -> Iterator[Problem]:
        """The combinations that only an MoE model can get wrong."""
        counts = self.expert_counts()
        if isinstance(counts, str):
            yield ("n_expert_by_block", "n_layer"), counts
            return
        if self.n_expert_by_block.strip():
            if not any(counts):
                message = "n_expert_by_block leaves no block with experts"
                yield ("n_expert_by_block",), f"{message}; set one of its numbers above 0, or n_expert=0"
            if self.expert_kind != "mlp" and not self.expert_hidden:
                message = "linear experts divide a width by their number, which differs from block to block"
                yield ("n_expert_by_block", "expert_kind", "expert_hidden"), f"{message}; set expert_hidden"
        elif self.moe_every > self.n_layer:
            message = f"moe_every = {self.moe_every} is more than n_layer = {self.n_layer}: no block would be MoE"
            yield ("moe_every", "n_layer", "n_expert"), f"{message}; set it lower, or n_expert=0"
        numbers = sorted({count for count in counts if count})
        if self.share_experts and len(numbers) > 1:
            message = "blocks that share their experts must have equally many"
            yield ("share_experts", "n_expert_by_block"), f"{message}; set share_experts=False"
        if numbers:
            yield from self.gate_problems(numbers[-1])
            yield from self.balance_problems(numbers[-1])
            yield from self.router_problems(numbers)
            yield from self.expert_problems(numbers)

    def gate_problems(self, n_expert: int) -> Iterator[Problem]:
        """How many experts, and how they are weighted, where the largest block has n_expert."""
        top_k = self.expert_top_k
        if top_k > n_expert:
            message = f"expert_top_k = {top_k} is more than n_expert = {n_expert}; expected at most that, or 0 for all"
            yield ("expert_top_k", "n_expert", "n_expert_by_block"), message
        if top_k == 1 and n_expert > 1 and self.gate_renormalize:
            message = "a single gate renormalised is always 1, so cross-entropy never reaches the router"
            keys = ("gate_renormalize", "expert_top_k", "n_expert")
            yield keys, f"{message}; set gate_renormalize=False, or expert_top_k to 2 or more"
        if self.gate_renormalize and (self.router_top_p or self.router == "expert_choice"):
            message = (
                "a character that gets a single expert has a renormalised gate of 1, which teaches the router nothing"
            )
            yield ("gate_renormalize", "router_top_p", "router"), f"{message}; set gate_renormalize=False"
        if self.gate_straight_through and top_k != 1:
            message = "a straight-through gate is for one expert a character"
            yield ("gate_straight_through", "expert_top_k"), f"{message}; set expert_top_k=1"
        if top_k == 0 and self.capacity_factor > 0:
            message = "soft routing (expert_top_k=0) uses every expert for every character, which no capacity can limit"
            yield ("capacity_factor", "expert_top_k", "n_expert"), f"{message}; set capacity_factor=0"
        if self.router_top_p and top_k in (0, 1):
            message = "router_top_p chooses among the expert_top_k best"
            yield ("router_top_p", "expert_top_k"), f"{message}; set expert_top_k between 2 and n_expert = {n_expert}"

    def balance_problems(self, n_expert: int) -> Iterator[Problem]:
        """Losses and biases that could balance nothing, where the largest block has n_expert."""
        chooses_all = self.expert_top_k in (0, n_expert) and n_expert > 1 and not self.router_top_p
        coefficient = ("aux_loss", "aux_loss_coef", "aux_loss_coef_end")
        if self.balances and chooses_all and self.aux_loss == "switch":
            message = "with every expert chosen the switch loss is the constant 1 and balances nothing"
            yield (*coefficient, "expert_top_k", "n_expert"), f"{message}; set aux_loss='none'"
        if self.router_bias_rate and chooses_all:
            message = "with every expert chosen there is no choice that a bias could change"
            yield ("router_bias_rate", "expert_top_k", "n_expert"), f"{message}; set router_bias_rate=0"
        if self.balances and self.aux_loss == "cv2" and self.capacity_factor:
            message = "the cv2 loss sees gates after capacity, which hides the very imbalance"
            yield (*coefficient, "capacity_factor"), f"{message}; set aux_loss='switch' or capacity_factor=0"
        untrained = self.router in ("frozen", "random", "hash", "ngram_hash")
        if untrained and (self.balances or self.z_loss_coef):
            message = f"router={self.router} is not trained, so no loss can balance it"
            yield ("router", *coefficient, "z_loss_coef"), f"{message}; set aux_loss='none' and z_loss_coef=0"
        if self.router == "two_level" and self.z_loss_coef:
            message = "two_level gives log-probabilities, whose z-loss is 0"
            yield ("router", "z_loss_coef"), f"{message}; set z_loss_coef=0"
        if self.router in ("hash", "ngram_hash", "two_level", "expert_choice") and self.router_bias_rate:
            message = f"router={self.router} does not choose by what a bias could change"
            yield ("router", "router_bias_rate"), f"{message}; set router_bias_rate=0"
        if self.router == "expert_choice" and self.balances:
            message = "expert_choice is balanced by construction"
            yield ("router", *coefficient), f"{message}; set aux_loss='none'"

    def router_problems(self, numbers: list[int]) -> Iterator[Problem]:
        """What each router cannot be combined with; numbers: of experts, in the blocks that have any."""
        top_k, router = self.expert_top_k, self.router
        if router in ("hash", "ngram_hash"):
            if top_k != 1:
                yield ("router", "expert_top_k"), f"{router} gives every character one expert; set expert_top_k=1"
            if self.router_level != "token":
                message = f"{router} routes by characters, not by vectors that could be averaged"
                yield ("router", "router_level"), f"{message}; set router_level='token'"
            if self.expert_dropout_is_used:
                message = f"a character has no other expert to go to under {router}"
                yield ("router", "expert_dropout", "expert_dropout_end"), f"{message}; set expert_dropout=0"
        if router in ("hash", "ngram_hash", "two_level") and self.gate != "softmax":
            yield ("router", "gate"), f"{router} gives log-probabilities; set gate='softmax'"
        if router == "two_level":
            groups = self.n_expert_group
            if top_k == 0 or any(n % groups or top_k > n // groups for n in numbers):
                message = f"n_expert = {numbers[0]} must make n_expert_group = {groups} equal groups of expert_top_k"
                keys = ("router", "n_expert_group", "n_expert", "n_expert_by_block", "expert_top_k")
                yield keys, f"{message} = {top_k} or more (0 is not all); set n_expert_group to a divisor of n_expert"
            if self.router_top_p:
                message = "top-p counts the probability of all groups, of which two_level uses one"
                yield ("router", "router_top_p"), f"{message}; set router_top_p=0"
        if router == "expert_choice":
            if not (self.capacity_factor > 0 and top_k > 0 and self.capacity_group == "sequence"):
                message = "expert_choice needs to know how many characters of a sequence an expert takes"
                keys = ("router", "capacity_factor", "expert_top_k", "capacity_group")
                yield keys, f"{message}; set expert_top_k=1, capacity_factor=1 and capacity_group='sequence'"
            if self.router_top_p or self.gate_straight_through or self.router_level == "sequence":
                message = "expert_choice chooses by itself, among characters that must differ"
                keys = ("router", "router_top_p", "gate_straight_through", "router_level")
                yield keys, f"{message}; set router_top_p=0, gate_straight_through=False, router_level='token'"
        if self.router_level == "segment" and self.segment_size >= self.block_size:
            message = f"segment_size = {self.segment_size} makes one segment of block_size = {self.block_size}"
            yield ("segment_size", "block_size", "router_level"), f"{message}; set it lower"

    def expert_problems(self, numbers: list[int]) -> Iterator[Problem]:
        """Widths and kinds; numbers: of experts, in the blocks that have any."""
        for n_expert in numbers:
            hidden = self.expert_hidden or 4 * self.n_embd // (1 if self.expert_kind == "mlp" else n_expert)
            if self.expert_kind != "mlp" and not self.expert_hidden and 4 * self.n_embd % n_expert:
                message = f"4 n_embd = {4 * self.n_embd} cannot be shared evenly by n_expert = {n_expert} experts"
                yield ("expert_kind", "expert_hidden", "n_embd", "n_expert"), f"{message}; set expert_hidden"
            elif self.moe_backend == "sorted" and (self.n_embd % 8 or hidden % 8):
                message = f"moe_backend='sorted' needs multiples of 8; n_embd = {self.n_embd}, hidden = {hidden}"
                yield ("moe_backend", "n_embd", "expert_hidden", "n_expert"), f"{message}; set moe_backend='auto'"
        if self.expert_kind != "mlp" and self.n_shared_expert:
            message = "shared experts are whole MLPs"
            yield ("n_shared_expert", "expert_kind"), f"{message}; set expert_kind='mlp'"

    def completed(self, files: list[ConfigFile]) -> Config:
        """With the title and the folder that follow from the config files, where the user gave none."""
        title = self.title or ", ".join(file.title for file in files if file.title)
        names = "-".join(file.path.stem for file in files) or "default"
        out_dir = self.out_dir or f"out/{names}-s{self.seed}"
        return dataclasses.replace(self, title=title, out_dir=out_dir)

    def expert_counts(self) -> list[int] | str:
        """The number of experts of each block, 0 for a dense one; or what is wrong with n_expert_by_block."""
        if not self.n_expert_by_block.strip():
            return [self.n_expert if (i + 1) % self.moe_every == 0 else 0 for i in range(self.n_layer)]
        words = [word.strip() for word in self.n_expert_by_block.split(",")]
        if len(words) != self.n_layer or not all(word.isdecimal() for word in words):
            found = f"n_expert_by_block is {self.n_expert_by_block!r}"
            return f"{found}; expected n_layer = {self.n_layer} numbers from 0, as {','.join(['4'] * self.n_layer)}"
        return [int(word) for word in words]

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the blocks that are MoE."""
        return [i for i, count in enumerate(self.expert_counts()) if count] if self.n_expert else []

    def of_block(self, i: int) -> Config:
        """The config with block i's own number of experts, of which no more can be chosen."""
        n_expert = self.expert_counts()[i]
        return dataclasses.replace(self, n_expert=n_expert, expert_top_k=min(self.expert_top_k, n_expert))

    @property
    def balances(self) -> bool:
        """Whether a balancing loss has a weight at some point of the run."""
        ends = self.aux_loss_coef_end > 0 and self.aux_loss_coef_schedule != "constant"
        return self.aux_loss != "none" and (self.aux_loss_coef > 0 or ends)

    @property
    def expert_dropout_is_used(self) -> bool:
        return self.expert_dropout > 0 or (self.expert_dropout_end > 0 and self.expert_dropout_schedule != "constant")

    @property
    def leaks(self) -> dict[str, str]:
        """Each key by which later characters, or other sequences, decide which expert a character gets: its causal
        twin."""
        leaks = {
            "router=expert_choice": "router=learned with a capacity_factor" if self.router == "expert_choice" else "",
            "router_level=sequence": "router_level=segment or prefix" if self.router_level == "sequence" else "",
            "capacity_group=batch": "capacity_group=sequence"
            if self.capacity_factor and self.capacity_group == "batch"
            else "",
        }
        return {key: twin for key, twin in leaks.items() if twin and self.n_expert}

    @property
    def is_causal(self) -> bool:
        return not self.leaks

    def to_dict(self) -> dict[str, Any]:
        """Every key, as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "record") -> Config:
        """The config of a checkpoint or a record, which problems call `origin`.

        A key that it lacks is younger than it and takes its default: a new key's default means what the code did
        before.
        """
        if not isinstance(values, dict):
            raise ConfigError([f"{origin}: the config is {shown(values)}; expected a mapping of keys to values"])
        reading = Reading(options_of(cls))
        for name, value in values.items():
            reading.assign(str(name), value, origin, accept_value)
        return reading.finish(cls)

    def hash(self) -> str:
        """Ten hex digits that two runs share when they differ in nothing but seed and machine.

        Only what differs from the defaults is hashed, so that a key added later changes no hash.
        """
        options = options_of(type(self))
        counted = {
            name: value
            for name, value in self.to_dict().items()
            if name != "seed" and options[name].scope != MACHINE and value != options[name].default
        }
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:10]

    @property
    def run_id(self) -> str:
        return f"{self.hash()}-s{self.seed}"

    def differences(self, other: Config, scopes: Iterable[str] = SCOPES) -> list[tuple[str, Any, Any]]:
        """(key, ours, theirs) for each key of these scopes in which the two differ."""
        scopes = tuple(scopes)
        keys = [name for name, option in options_of(type(self)).items() if option.scope in scopes]
        return [(k, getattr(self, k), getattr(other, k)) for k in keys if getattr(self, k) != getattr(other, k)]
