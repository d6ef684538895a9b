"""Keeps the output of torch.compile in a file, for the next process.

    with compile_cache.reused("out/compile_cache", machine, key=config.hash(), say=print):
        ...                 # compile

Before: the file of this device, precision, version of torch and key is loaded. After: it is written, where something
was compiled that it lacks. A file is a header line and torch's artifacts. They are code: load none but your own.
"""

import contextlib
import hashlib
import json
import re
from pathlib import Path

import torch

from support import files
from support.files import FileError
from support.machines import describe

FORMAT = "charmoe compile cache 1"


@contextlib.contextmanager
def reused(folder: str, machine, key: str, say):
    """A context to compile in. folder: "" for none; say: gets a line for what was loaded, or could not be. No fault of
    the file stops a run."""
    if not folder:
        yield
        return
    described = describe(machine)
    about = {"format": FORMAT, "key": key} | {name: described[name] for name in ("device", "torch", "dtype")}
    name = re.sub(r"[^\w.+-]+", "_", f"{about['device']}-torch-{about['torch']}-{about['dtype']}-{key}.cache")
    path = Path(folder) / name
    loaded = load(path, about, say)
    yield
    save(path, about, loaded, say)


def load(path: Path, about: dict, say) -> set[tuple[str, str]]:
    """Give torch what the file holds. -> (kind, key) of each part; none where the file is absent or unusable"""
    try:
        if not path.exists():
            return set()
        head, _, content = path.read_bytes().partition(b"\n")
        found = json.loads(head)
        if found != {**about, "sha256": hashlib.sha256(content).hexdigest()}:
            raise ValueError("it is damaged, or of another device or version of torch")
        info = torch.compiler.load_cache_artifacts(content)
        if info is None:
            raise ValueError("torch cannot read it")
    except Exception as error:  # whatever torch raises for artifacts of another build
        say(f"{path} is not used, and this run compiles anew: {files.first_line(error)}")
        return set()
    say(f"compiled before: using {path}")
    return parts_of(info)


def save(path: Path, about: dict, loaded: set[tuple[str, str]], say) -> None:
    """Write the file, where this process compiled or used something else than was loaded."""
    try:
        made = torch.compiler.save_cache_artifacts()
        if made is None or parts_of(made[1]) <= loaded:
            return
        with files.writing(path.parent, way_out="the run goes on without"):
            path.parent.mkdir(parents=True, exist_ok=True)
        with files.writing(path, way_out="the run goes on without"):
            with open(path.with_name(f"{path.name}.lock"), "ab") as lock:
                if files.lock(lock) is not False:  # else another run with the same settings writes the same
                    head = json.dumps({**about, "sha256": hashlib.sha256(made[0]).hexdigest()})
                    files.write_atomically(path, head.encode() + b"\n" + made[0])
    except FileError as error:
        say(str(error))
    except Exception as error:  # a fault of torch's costs the next run some seconds, and this one nothing
        say(f"{path} could not be made: {files.first_line(error)}")


def parts_of(info) -> set[tuple[str, str]]:
    return {(kind, key) for kind, keys in info.artifacts.items() for key in keys}
