"""Run config files: Python with plain assignments, each value with the line that assigned it.

A file may begin with `from config.shakespeare_dense import *` and change what differs; the first line of its docstring
is the run's title. Files and their bases run again every time: nothing enters `sys.modules`, no bytecode is kept.
"""

from __future__ import annotations

import ast
import builtins
import functools
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.files import ROOT, read_whole, shown_path
from support.options import ConfigError, nearest


@dataclass(frozen=True)
class ConfigFile:
    """A config file that has run: its title, its values, and where each was assigned (`config/foo.py:12`)."""

    path: Path
    title: str
    values: dict[str, Any]
    origins: dict[str, str]


def run_file(path: Path, importers: tuple[Path, ...] = ()) -> ConfigFile:
    """Run a config file in a namespace of its own. importers: the config files that import it, outermost first.

    Raises ConfigError, with one problem, when the file cannot be read, is no Python, or fails while it runs.
    """
    name = shown_path(path)
    if path in importers:
        raise ConfigError([f"{name}: imports itself by way of {shown_path(importers[-1])}; expected plain bases"])
    tree, code = compile_file(path)
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
        raise  # the problem of a base, which already has its line
    except (Exception, SystemExit) as error:
        problem = f"{name}:{failing_line(error, path)}: {type(error).__name__}: {error}"
        raise ConfigError([problem]) from None
    title = (ast.get_docstring(tree) or "").partition("\n")[0]
    values = {key: value for key, value in namespace.items() if not key.startswith("_")}
    return ConfigFile(path, title, values, assignment_origins(tree, path, bases))


def compile_file(path: Path) -> tuple[ast.Module, types.CodeType]:
    """The file as a syntax tree (for line numbers) and as code. Raises ConfigError when it is not readable Python."""
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
    """The `__import__` of the config file at `path`: config files run again, all else is imported as usual.

    `config.NAME` is a file of this project, whatever the current folder; other names are looked for beside `path`.
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
    """Where each name got its last value: a line of the file, or of the base that it imports."""
    origins: dict[str, str] = {}
    for statement in tree.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and node.module in bases:
                origins.update(bases[node.module].origins)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                origins[node.id] = f"{shown_path(path)}:{node.lineno}"
    return origins


def failing_line(error: BaseException, path: Path) -> int:
    """The line of the file that raised the error."""
    line, step = 0, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            line = step.tb_lineno
        step = step.tb_next
    return line


def nearest_file(path: Path) -> str:
    """A hint, `; nearest: …`, at a config file with a name like that of `path`; empty when there is none."""
    folders = [ROOT / "config"] + ([path.parent] if path.parent != ROOT else [])
    known = {file.stem: file for folder in folders for file in sorted(folder.glob("*.py"))}
    match = nearest(path.stem, known)
    return f"; nearest: {shown_path(known[match])}" if match else ""
