"""Imports go down only, nothing imports in a circle, and no module grows past one thought."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From the ground up: a floor may import its own and those before it.
FLOORS = (
    ("support",),
    ("data",),
    ("selection", "hashing", "routing", "balance", "backends"),
    ("moe",),
    ("model",),
    ("run",),
    ("speed",),
    ("analysis",),
    ("papers",),
    ("report",),
    ("train", "sample", "bench", "sweep", "analyze", "plot_results"),
)
SCRIPTS = FLOORS[-1]
LONGEST_MODULE = 500  # lines


def modules():
    """{dotted name: path} of everything that is not a test or a config."""
    paths = [path for path in ROOT.glob("*.py")]
    paths += [path for folder in ROOT.iterdir() if (folder / "__init__.py").exists() for path in folder.rglob("*.py")]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
        if path.relative_to(ROOT).parts[0] not in ("tests", "config")
    }


def imports(path, known):
    """Names of our modules that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in known}


def floor_of(name):
    room = name.partition(".")[0]
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), None)


def test_every_module_has_a_floor():
    assert [name for name in modules() if floor_of(name) is None] == []


def test_imports_go_down_only():
    known = modules()
    upward = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imports(path, known)
        if floor_of(other) > floor_of(name)
    ]
    assert upward == []


def test_no_script_imports_another():
    known = modules()
    assert [name for name in SCRIPTS if imports(known[name], known) & set(SCRIPTS)] == []


def test_nothing_imports_in_a_circle():
    known = modules()
    graph = {name: imports(path, known) - {name} for name, path in known.items()}
    done = set()

    def visit(name, above):
        assert name not in above, f"a circle: {' -> '.join([*above[above.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_every_room_says_what_it_knows():
    rooms = [path for name, path in modules().items() if path.name == "__init__.py"]
    assert len(rooms) >= 7
    assert [str(path) for path in rooms if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_no_module_is_longer_than_one_thought():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_MODULE} == {}
