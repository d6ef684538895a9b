"""Reads local runs, also while they train, as far as their loss curves need it.

runs, left_out = read_runs(["out/a", "out/b"])
figures_of_table.curves_of_runs(grouped(runs))
"""

from collections.abc import Iterable
from pathlib import Path

from run import identity, records
from run.records import RecordError
from support.files import ROOT, read_json, read_json_lines
from support.options import EXPERIMENT, SCHEDULE
from support.schema import COUNT, FITS, NUMBER


def read_runs(folders: Iterable[str]) -> tuple[list[dict], list[str]]:
    """(the runs with an evaluation, a line for everything else). A run has a title, its folder, an Identity, the
    unit of its text and evaluations. A folder that is given twice counts once, and so does a run with copies."""
    runs, left_out, seen = [], [], {}
    for folder in map(Path, folders):
        place = folder.resolve()
        if place in seen:
            left_out.append(f"{folder}: the same folder as {seen[place]}, which counts once")
            continue
        seen[place] = folder
        try:
            runs.append(read_run(folder, left_out))
        except RecordError as error:
            left_out.append(str(error))
    return without_copies(runs, left_out), left_out


def without_copies(runs, left_out):
    """The runs without those that another one repeats: of the same experiment and seed, with the same losses as far as
    both have come. The one that has come farther counts."""
    kept = {}
    for run in runs:
        losses = [(line["step"], line["clean"]["nats"], line["paper"]["train"]) for line in run["evaluations"]]
        identity = run["identity"]
        same = kept.setdefault((identity.experiment, identity.config.seed, identity.straight), [])
        for i, (other, theirs) in enumerate(same):
            common = min(len(losses), len(theirs))
            if losses[:common] == theirs[:common]:
                copy, counts = (other, run) if len(losses) > len(theirs) else (run, other)
                left_out.append(f"{copy['folder']}: the same run as {counts['folder']}, which counts once")
                same[i] = (counts, max(losses, theirs, key=len))
                break
        else:
            same.append((run, losses))
    counting = [id(run) for same in kept.values() for run, _ in same]
    return [run for run in runs if id(run) in counting]


def read_run(folder, left_out):
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    if not config.is_file() or not metrics.is_file():
        raise RecordError(f"{folder}: holds no run (no config.json with a metrics.jsonl)")
    try:
        found = identity.read(config)
        if found.text_sha256 is None:  # a folder that is older than the field
            found = in_record(folder / "summary.json", found)
        lines, broken = read_json_lines(metrics)
    except OSError as error:
        raise RecordError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecordError(f"{config}: not the config of a run ({error})") from None
    left_out += [f"{metrics}:{number}: not a whole line of JSON" for number in broken]
    evaluations = [line for line in lines if is_evaluation(line)]
    if not evaluations:
        raise RecordError(f"{folder}: has no evaluation yet")
    title, unit = found.config.title or folder.resolve().name, unit_of(found.config)
    return {"title": title, "folder": str(folder), "identity": found, "unit": unit, "evaluations": evaluations}


def unit_of(config):
    """What a loss is per: character or byte as the data set's folder says, symbol where there is none."""
    try:
        return read_json(ROOT / "data" / config.dataset / "meta.json")["unit"]
    except (OSError, ValueError, KeyError, TypeError):
        return "symbol"


def in_record(path, found):
    """The identity as the record of a complete run tells it; `found` where there is no record."""
    try:
        record = records.read(path)
    except RecordError:
        return found
    return found._replace(text_sha256=record["dataset"]["sha256"], straight=records.is_straight(record))


def is_evaluation(line):
    """Whether a line of metrics.jsonl has the numbers that curves need."""
    try:
        numbers = line["clean"]["nats"], line["paper"]["train"], line.get("train_seconds", 0.0)
        return line["kind"] == "eval" and FITS[COUNT](line["step"]) and all(map(FITS[NUMBER], numbers))
    except (AttributeError, KeyError, TypeError):
        return False


def grouped(runs: list[dict]) -> dict[str, list[dict]]:
    """label -> the runs that differ only in seed and machine. A run that is not straight stands alone.

    The label is the title. Where several experiments share one, the options that differ from the first are added.
    """
    by_experiment = {}
    for run in runs:
        alone = None if run["identity"].straight else run["folder"]
        by_experiment.setdefault((run["identity"].experiment, alone), []).append(run)
    groups, first_of = {}, {}
    for (_, alone), group in by_experiment.items():
        title, one = group[0]["title"], group[0]["identity"]
        first = first_of.setdefault(title, one)
        same_text = one.text_sha256 is not None and one.text_sha256 == first.text_sha256
        passed_over = ("seed", "dataset") if same_text else ("seed",)
        differing = one.config.differences(first.config, (EXPERIMENT, SCHEDULE))
        apart = [f"{key}={ours}" for key, ours, _ in differing if key not in passed_over]
        apart += [f"text {(one.text_sha256 or 'unknown')[:8]}"] if one.text_sha256 != first.text_sha256 else []
        apart += [f"not straight ({alone})"] if alone else []
        groups[", ".join([title, *apart])] = group
    return groups
