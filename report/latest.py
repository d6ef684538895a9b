"""Reads local runs, also while they train, as far as their loss curves need it.

runs, left_out = read_runs(["out/a", "out/b"])
figures.curves_of_runs(grouped(runs))
"""

import json
from collections.abc import Iterable
from pathlib import Path

from run.records import RecordError
from run.settings import Config
from support.files import LARGEST_JSON, read_json, read_whole
from support.options import EXPERIMENT, SCHEDULE
from support.schema import COUNT, FITS, NUMBER


def read_runs(folders: Iterable[str]) -> tuple[list[dict], list[str]]:
    """(the runs with an evaluation, a line for everything else). A run has a title, a config and evaluations."""
    runs, left_out = [], []
    for folder in folders:
        try:
            runs.append(read_run(Path(folder), left_out))
        except RecordError as error:
            left_out.append(str(error))
    return runs, left_out


def read_run(folder, left_out):
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    if not config.is_file() or not metrics.is_file():
        raise RecordError(f"{folder}: holds no run (no config.json with a metrics.jsonl)")
    try:
        values = Config.from_dict(read_json(config), origin=str(config)).to_dict()
        evaluations = [line for line in read_json_lines(metrics, left_out) if is_evaluation(line)]
    except OSError as error:
        raise RecordError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecordError(f"{config}: not the config of a run ({error})") from None
    if not evaluations:
        raise RecordError(f"{folder}: has no evaluation yet")
    return {"title": values["title"] or folder.name, "config": values, "evaluations": evaluations}


def read_json_lines(path, left_out):
    """The complete lines of a file that may be growing."""
    lines = []
    text = read_whole(path, LARGEST_JSON).decode(errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            left_out.append(f"{path}:{number}: not a whole line of JSON")
    return lines


def is_evaluation(line):
    """Whether a line of metrics.jsonl has the numbers that curves need."""
    try:
        numbers = line["clean"]["nats"], line["paper"]["train"], line.get("train_seconds", 0.0)
        return line["kind"] == "eval" and FITS[COUNT](line["step"]) and all(map(FITS[NUMBER], numbers))
    except (AttributeError, KeyError, TypeError):
        return False


def grouped(runs: list[dict]) -> dict[str, list[dict]]:
    """label -> the runs that differ only in seed and machine.

    The label is the title. Where several experiments share one, the options that differ from the first are added.
    """
    by_hash = {}
    for run in runs:
        by_hash.setdefault(Config.from_dict(run["config"]).hash(), []).append(run)
    groups, first_of = {}, {}
    for group in by_hash.values():
        title, config = group[0]["title"], Config.from_dict(group[0]["config"])
        first = first_of.setdefault(title, config)
        apart = [f"{key}={ours}" for key, ours, _ in config.differences(first, (EXPERIMENT, SCHEDULE)) if key != "seed"]
        groups[", ".join([title, *apart])] = group
    return groups
