"""The identity of a run, as its folder keeps it in config.json: config, seed and text.

    write(folder / "config.json", Identity(config, dataset.source_sha256, machine, straight))
    identity = read(folder / "config.json")
    identity.config, identity.text_sha256, identity.experiment

Two runs are of one experiment where their configs and texts are the same, however the data set's path is spelled. Needs
no torch.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from run.settings import Config
from support.files import read_json, write_json
from support.options import ConfigError
from support.schema import FLAG, SHA256, TEXT, mismatches

# What config.json holds beside the keys of a Config; older ones have none of these.
BESIDE = {"text_sha256?": SHA256, "machine?": TEXT, "straight?": FLAG}


class Identity(NamedTuple):
    config: Config
    text_sha256: str | None = None  # of the text; None where it is unknown
    machine: str | None = None  # as records.machine_of names it; None where it is unknown
    straight: bool = True  # see straight.py

    @property
    def experiment(self) -> tuple:
        """Equal for runs that differ only in seed and keys of the machine."""
        config = self.config.written_out()
        if self.text_sha256 is None:
            return config.hash(), None
        return dataclasses.replace(config, dataset="").hash(), self.text_sha256


def write(path: Path, identity: Identity) -> None:
    """Write config.json: every key of the config, and the fields beside it."""
    write_json(path, {**identity.config.to_dict(), **{name: getattr(identity, name) for name in Identity._fields[1:]}})


def read(path: Path) -> Identity:
    """The identity in a config.json. OSError or ValueError where it cannot be read or is none."""
    values = read_json(path)
    if wrong := [f"{path}: {line}" for line in mismatches(values, BESIDE)]:
        raise ConfigError(wrong)
    beside = {name: values.pop(name) for name in Identity._fields[1:] if name in values}
    return Identity(Config.from_dict(values, origin=str(path)), **beside)
