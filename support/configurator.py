"""Read config files and `--key=value` arguments into a checked dataclass.

    config = parse(Config, sys.argv[1:])      # train.py config/shakespeare_moe4.py config/cpu.py --seed=2

- Files (`support/config_files.py`) and options apply from left to right; the last value of a key counts.
- All problems are told at once, each with its origin (`config/foo.py:12`, `--n_head=5`), what was expected and the
  nearest key.
- `parse` works for any dataclass whose fields are made with `option`; `settings.Config` is the one for training.
"""

from __future__ import annotations

import itertools
import os
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from support.config_files import ConfigFile, run_file
from support.files import expanded, one_line, shown, shown_path
from support.options import (
    ConfigError,
    Option,
    accept_text,
    accept_value,
    choices_of,
    expectation,
    fitted,
    nearest,
    options_of,
)

PAGE_WIDTH = 100  # columns of --help


class Message(Exception):
    """A page that the user asked for (--help, --print-config): the script prints `text` and exits 0."""

    def __init__(self, text: str):
        self.text = text
        super().__init__(text)


# ---------------------------------------------------------------------------------------------------------------------
# From arguments to an instance


def parse(
    cls: type, argv: list[str], *, usage: str = "", description: str = "", problems_of: Callable | None = None
) -> Any:
    """An instance of the dataclass `cls` from command-line arguments (without the program's name).

    Every field of `cls` is made with `option`. The class may have
    - `takes_files = True` (a ClassVar): arguments without `--` are config files;
    - `absent` (a ClassVar): {key of nanoGPT that is no key here: why, and what to do};
    - `inherited(values, files)`: ({key: value}, origin) for keys that no argument sets;
    - `problems(self)`: yields (keys, message) for each impossible combination of keys; `problems_of` replaces it;
    - `completed(self, files)`: the instance with the values derived from its ConfigFiles.

    Raises ConfigError with all problems at once, and Message for --help and --print-config.
    """
    if "--help" in argv or "-h" in argv:
        raise Message(help_page(cls, usage, description))
    reading = Reading(options_of(cls), getattr(cls, "absent", None))
    apply_arguments(reading, [a for a in argv if a != "--print-config"], getattr(cls, "takes_files", False))
    for name, value in reading.values.items():
        reading.values[name] = os.path.expanduser(value) if reading.options[name].is_path else value
    if hasattr(cls, "inherited"):
        inherited, origin = cls.inherited(reading.values, reading.files)
        for name in inherited.keys() - reading.values.keys() - reading.broken:
            reading.assign(name, inherited[name], origin, accept_value)
    instance = reading.finish(cls, problems_of)
    completed = instance.completed(reading.files) if hasattr(cls, "completed") else instance
    if "--print-config" in argv:
        derived = [name for name in reading.options if getattr(completed, name) != getattr(instance, name)]
        raise Message(config_page(completed, reading.options, reading.origins | dict.fromkeys(derived, "derived")))
    return completed


class Reading:
    """The assignments read so far with their origins, and all problems found."""

    def __init__(self, options: dict[str, Option], absent: dict[str, str] | None = None):
        self.options, self.absent = options, absent or {}
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.files: list[ConfigFile] = []
        self.problems: list[str] = []
        self.broken: set[str] = set()  # keys with a refused value; combinations with them are not checked
        self.file_failed = False  # a config file could not run, so any key's value may be missing

    def assign(self, name: str, raw: Any, origin: str, accept: Callable[[Any, Any], Any]) -> None:
        """Set a key to `raw`, read by `accept` (`accept_text` or `accept_value`), or note the problem."""
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
        if name in self.absent:
            self.problems.append(f"{origin}: {self.absent[name]}")
            return
        guess = nearest(name, (*self.options, "help", "print-config"))
        hint = f"nearest key: {guess}" if guess else "--help lists the keys"
        self.refuse(f"{origin}: unknown key {name!r}; {hint}", guess or name)

    def finish(self, cls: type, problems_of: Callable | None = None) -> Any:
        """The instance, after checking its combinations of keys. Raises ConfigError with all problems."""
        instance = cls(**self.values)
        problems_of = problems_of or getattr(cls, "problems", None)
        if problems_of and not self.file_failed:
            self.problems += [
                f"{self.origin_of(keys)}: {message}"
                for keys, message in problems_of(instance)
                if not self.broken.intersection(keys)
            ]
        if self.problems:
            raise ConfigError(self.problems)
        return instance

    def origin_of(self, keys: Iterable[str]) -> str:
        """Where the keys were set, without those at their default; "default" if all are."""
        origins = dict.fromkeys(self.origins[key] for key in keys if key in self.origins)
        return ", ".join(origins) or "default"


def apply_arguments(reading: Reading, argv: list[str], takes_files: bool) -> None:
    """Apply the arguments to the reading, from left to right."""
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
            read_file(reading, Path(os.path.abspath(expanded(argument))))
        else:
            reading.problems.append(f"{argument}: expected --key=value; no config files are taken here")


def read_bare(reading: Reading, name: str, waiting: list[str]) -> None:
    """Read an argument without `=`: `--flag` sets a bool, `--key value` is refused with the right spelling."""
    option = reading.options.get(name)
    if option is None:
        reading.refuse_unknown(name, f"--{name}")
        return
    following = waiting[0] if waiting else "--"
    if not (following.startswith("--") or following.endswith(".py")):
        waiting.pop(0)
        reading.refuse(f"--{name} {following}: expected --{name}={following}", name)
    elif bool in option.kinds:
        reading.assign(name, True, f"--{name}", accept_value)
    else:
        reading.refuse(f"--{name}: has no value; expected --{name}=VALUE, {expectation(option)}", name)


def read_file(reading: Reading, path: Path) -> None:
    """Run a config file and take its names as keys, except modules, functions and classes."""
    try:
        file = run_file(path)
    except ConfigError as error:
        reading.problems += error.problems
        reading.file_failed = True
        return
    reading.files.append(file)
    for name, value in file.values.items():
        # `seed = max` is a mistake, so a function under the name of a key is refused and not skipped.
        if name in reading.options or not (callable(value) or isinstance(value, types.ModuleType)):
            reading.assign(name, value, file.origins.get(name, shown_path(path)), accept_value)


# ---------------------------------------------------------------------------------------------------------------------
# Pages to read


def help_page(cls: type, usage: str, description: str) -> str:
    """The page of --help: every key with its default, type and one line of help, by group."""
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
            choices = choices_of(option) if len(option.kinds) == 1 else []
            text = option.help + (f" {{{', '.join(choices)}}}" if choices else "")
            lines += textwrap.wrap(text, PAGE_WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
    return "\n".join(lines)


def type_name(option: Option) -> str:
    """The type as --help shows it: int, bool, choice, …; with several kinds the choices by name, as in bool|auto."""
    if len(option.kinds) == 1 and choices_of(option):
        return "choice"
    return "|".join([kind.__name__ for kind in option.kinds if isinstance(kind, type)] + choices_of(option))


def by_group(options: dict[str, Option]) -> Iterator[tuple[str, list[Option]]]:
    """The options of each group; groups in the order in which they first appear."""
    for group in dict.fromkeys(option.group for option in options.values()):
        yield group, [option for option in options.values() if option.group == group]


def config_page(instance: Any, options: dict[str, Option], origins: dict[str, str]) -> str:
    """The page of --print-config: the resolved values with their origins, itself a config file."""
    settings = {name: f"{name} = {getattr(instance, name)!r}" for name in options}
    width = min(40, max(map(len, settings.values())))
    lines = []
    for group, members in by_group(options):
        lines += ["", f"# {group}"]
        for option in members:
            origin = one_line(origins.get(option.name, "default"))
            lines.append(f"{settings[option.name].ljust(width)}  # {origin}")
    return "\n".join(lines[1:])
