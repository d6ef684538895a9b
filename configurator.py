"""From config files in Python and `--key=value` to a checked dataclass.

    config = parse(Config, sys.argv[1:])      # train.py config/shakespeare_moe4.py config/cpu.py --seed=2

- Files and options apply from left to right: the last word on a key counts.
- A config file is Python with plain assignments. It may begin with `from config.shakespeare_dense import *` and
  change what differs; the first line of its docstring is the run's title. The imported files run afresh every time:
  nothing enters `sys.modules`, no bytecode is kept, so what counts is what the files say now.
- Every problem is found before any is told: unknown keys, wrong types, values out of range, impossible combinations,
  each with where it came from (`config/foo.py:12`, `--n_head=5`), what was expected and the nearest key.
- `parse` works for any dataclass whose fields are made with `option`; `settings.Config` is the one for training.
- `--help` and `--print-config` are raised as a `Message`, which a script prints before it exits 0.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import difflib
import errno
import functools
import itertools
import json
import math
import os
import stat
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent
PAGE_WIDTH = 100  # columns of --help
LONGEST_LINE = 1900  # characters of a problem, whatever it quotes
# What tensors can hold: of int64, of float32 (where less than the smallest becomes 0).
LARGEST_INT, LARGEST_FLOAT, SMALLEST_FLOAT = 2**63 - 1, (2 - 2**-23) * 2.0**127, 2.0**-126
# Bytes of what a person writes, as a config file or a prompt, and of what a program does, as a record.
LARGEST_TEXT, LARGEST_JSON = 1 << 20, 1 << 26

# Each key has a scope, which says what a different value means:
EXPERIMENT = "experiment"  # another result: in the hash, must match when a run is resumed
SCHEDULE = "schedule"  # a longer or finer look at the same run: in the hash, may change on resume
MACHINE = "machine"  # where and how the run is made: not in the hash
SCOPES = (EXPERIMENT, SCHEDULE, MACHINE)


class ConfigError(ValueError):
    """What is wrong with a configuration: `problems` holds all of it, one line each."""

    def __init__(self, problems: Iterable[str]):
        self.problems = [one_line(problem) for problem in problems]
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


@functools.cache
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
    """The known word that looks most like `word`, or has it for initials (lr: learning_rate), if any does."""
    known = list(known)
    by_initials = [other for other in known if "_" in other and word == "".join(part[:1] for part in other.split("_"))]
    matches = by_initials or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return matches[0] if matches else None


# ---------------------------------------------------------------------------------------------------------------------
# Values: one rule for what a type accepts, from a file or from the command line


def accept_value(kind: Any, value: Any) -> Any:
    """`value` as a value of `kind`: an integer is a fine float, a bool is no number, text is neither. Else ValueError,
    or OverflowError for a number that no tensor can hold."""
    if typing.get_origin(kind) is Literal:
        if type(value) is str and value in typing.get_args(kind):
            return value
    elif kind is float and type(value) in (int, float):
        if value and math.isfinite(value) and not SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT:
            raise OverflowError("one that 32 bits can hold")
        if math.isfinite(value):
            return float(value)
    elif kind is int and (type(value) is int or (type(value) is float and value.is_integer())):  # max_iters = 1e5
        if abs(value) > LARGEST_INT:
            raise OverflowError("one that 64 bits can hold")
        return int(value)
    elif kind is str and type(value) is str:
        if "\0" not in value:  # which no name of a file can have
            return value
    elif type(value) is kind:
        return value
    raise ValueError


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can encode it: what comes of other bytes on a command line is half of a character each."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    """`raw` as the first of the option's kinds that accepts it within the option's range. If none does: ValueError, or
    OverflowError where only a tensor's precision is in the way."""
    overflow = None
    for kind in option.kinds:
        try:
            value = accept(kind, raw)
        except OverflowError as error:
            overflow = error
        except ValueError:
            pass
        else:
            if in_range(option, value):
                return value
    raise overflow or ValueError


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
    names = {bool: "True or False", int: f"an integer {limits}", float: f"a number {limits}", str: "text without NUL"}
    words = [names[kind].strip() for kind in option.kinds if kind in names]
    words += [repr(choice) for choice in choices_of(option)]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def shown(value: Any) -> str:
    """A value as a problem quotes it: on one line, and not for pages."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of thousands of digits, a list in a list a thousand times, an object of the user's
        return f"<{type(value).__name__} that cannot be shown>"
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(text: str) -> str:
    """`text` as every terminal can show it: on one line, with what cannot be printed as \\n, \\x1b or \\udcff, and
    without the middle of what goes on for pages."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.strip())
    half = LONGEST_LINE // 2
    return line if len(line) <= LONGEST_LINE else f"{line[:half]} ... {line[-half:]}"


# ---------------------------------------------------------------------------------------------------------------------
# Files that others wrote


def read_whole(path: str | Path, largest: int = LARGEST_TEXT) -> bytes:
    """What the file at `path` holds. OSError, too, for pipes and devices, which may never end, and for what is larger
    than such a file can be."""
    try:
        status = os.stat(path)
    except ValueError:  # NUL or half a character is in it
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    problem = None
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        problem = "it is a pipe or a device, not a file"
    elif status.st_size > largest:
        problem = f"it has {status.st_size:,} bytes; at most {largest:,} are read"
    if problem:
        raise OSError(errno.EINVAL, problem, str(path))
    return Path(path).read_bytes()  # IsADirectoryError for a folder


def read_json(path: str | Path) -> Any:
    """What the JSON file at `path` says. OSError where it cannot be read; ValueError where it is no JSON, or has twice
    the same name in one object, or numbers that are none."""
    try:
        text = read_whole(path, LARGEST_JSON).decode()
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_twins)
    except RecursionError:
        raise ValueError("its objects and lists are nested too deep") from None


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is in it, which is no number")


def refuse_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        twin = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"the field {shown(twin)} is in one object twice")
    return names


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
        tree = ast.parse(read_whole(path), filename=str(path))
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
    except ValueError as error:  # not UTF-8, or NUL in it
        problem = f"{name}: syntax error, {error}; expected Python"
    except (RecursionError, MemoryError):
        problem = f"{name}: syntax error, its expressions are nested too deep; expected plain assignments"
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
        except (ValueError, OverflowError) as error:
            guess = nearest(raw, choices_of(option)) if isinstance(raw, str) else None
            hint = f"; nearest: {guess!r}" if guess else f", and {error}" if isinstance(error, OverflowError) else ""
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
    except (ValueError, OverflowError):
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
    for is_prose, rows in itertools.groupby(description.strip().splitlines(), lambda row: row[:1].strip() != ""):
        block = list(rows)
        lines += textwrap.wrap(" ".join(block), PAGE_WIDTH) if is_prose else block
    lines += [""] if description else []
    lines += ["The last value given for a key counts. Shown are the defaults."]
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
            origin = one_line(origins.get(option.name, "default"))
            lines.append(f"{settings[option.name].ljust(width)}  # {origin}")
    return "\n".join(lines[1:])
