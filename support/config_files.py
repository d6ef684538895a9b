"""Run config files: Python with plain assignments, each value with the line that assigned it.

A file may begin with `from config.shakespeare_dense import *` and change what differs; the first line of its docstring
is the run's title, or else the file's name. Files and their bases run again every time: nothing enters `sys.modules`,
no bytecode is kept.
"""

from __future__ import annotations

import ast
import builtins
import traceback
import types
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
    if path.suffix == ".json":
        raise ConfigError([f"{name}: JSON, as a run keeps its settings; expected the config file in Python"])
    if path in importers:
        raise ConfigError([f"{name}: imports itself by way of {shown_path(importers[-1])}; expected plain bases"])
    tree, code = compile_file(path)
    bases: dict[str, ConfigFile] = {}

    def import_(dotted, globals=None, locals=None, fromlist=(), level=0):
        """`config.NAME` is a file of this project, other names are looked for beside `path`; both run again."""
        ours = dotted.partition(".")[0] == "config" and level == 0
        base = (ROOT if ours else path.parent) / (dotted.replace(".", "/") + ".py")
        if ours and not (fromlist and base.is_file()):
            raise ImportError(f"expected `from config.NAME import *`{nearest_file(base)}")
        if level or not base.is_file() or ("." in dotted and not fromlist):
            return builtins.__import__(dotted, globals, locals, fromlist, level)
        bases[dotted] = run_file(base, (*importers, path))
        module = types.ModuleType(dotted)
        vars(module).update(bases[dotted].values)
        return module

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
        frames = traceback.walk_tb(error.__traceback__)
        line = [line for frame, line in frames if frame.f_code.co_filename == str(path)][-1]
        raise ConfigError([f"{name}:{line}: {type(error).__name__}: {error}"]) from None
    title = (ast.get_docstring(tree) or path.stem).partition("\n")[0]
    values = {key: value for key, value in namespace.items() if not key.startswith("_")}
    return ConfigFile(path, title, values, assignment_origins(tree, path, bases))


def compile_file(path: Path) -> tuple[ast.Module, types.CodeType]:
    """The file as a syntax tree (for line numbers) and as code. Raises ConfigError when it is not readable Python."""
    name = shown_path(path)
    try:
        tree = ast.parse(read_whole(path), filename=str(path))
        # Without dont_inherit the file would get this module's `from __future__ import annotations`.
        return tree, compile(tree, str(path), "exec", dont_inherit=True)
    except OSError as error:
        problem = f"{name}: {error.strerror}; expected the path of a config file{nearest_file(path)}"
    except SyntaxError as error:
        line = f":{error.lineno}" if error.lineno else ""
        text = f": {error.text.strip()}" if error.text else ""
        problem = f"{name}{line}: syntax error, {error.msg}{text}; expected Python"
    except (ValueError, RecursionError, MemoryError) as error:  # not UTF-8, NUL in it, nested too deep
        problem = f"{name}: syntax error, {str(error) or 'nested too deep'}; expected Python"
    raise ConfigError([problem])


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


def nearest_file(path: Path) -> str:
    """A hint, `; nearest: …`, at a config file with a name like that of `path`; empty when there is none."""
    folders = [ROOT / "config"] + ([path.parent] if path.parent != ROOT else [])
    known = {file.stem: file for folder in folders for file in sorted(folder.glob("*.py"))}
    match = nearest(path.stem, known)
    return f"; nearest: {shown_path(known[match])}" if match else ""
