"""Records -> tables and pictures.

    python plot_results.py                          results/*/*.json -> results/summary.md, results/TABLE_curves.png
    python plot_results.py --latest out/A out/B …   curves of local runs, also while they train -> curves.png

A record is the summary.json of a complete run; records of one config and different seeds are one row, mean ± sample
SD (n).
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed
import matplotlib.pyplot as plt  # noqa: E402

from configurator import EXPERIMENT, SCHEDULE  # noqa: E402
from records import FORMAT, is_comparable  # noqa: E402
from settings import Config  # noqa: E402

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
# Okabe and Ito (2008): colour-blind readers can tell them apart.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#F0E442")


class RecordError(ValueError):
    """A record that cannot be read: which, and why."""


def read_json_lines(path):
    """The whole lines of a file that may be growing."""
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError:
            print(f"{path}:{number}: not a whole line of JSON, left out", file=sys.stderr)
    return lines


def read_record(path):
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as a record ({error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RecordError(f"{path}: not a record of train.py (its format should be {FORMAT!r})")
    return record


def read_run(folder):
    """A run, finished or not, as the part of a record that curves need."""
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    if not config.is_file() or not metrics.is_file():
        raise RecordError(f"{folder}: holds no run (no config.json with a metrics.jsonl)")
    try:
        values = Config.from_dict(json.loads(config.read_text()), origin=str(config)).to_dict()
    except ValueError as error:
        raise RecordError(f"{config}: not the config of a run ({error})") from None
    evaluations = [line for line in read_json_lines(metrics) if line["kind"] == "eval"]
    if not evaluations:
        raise RecordError(f"{folder}: has no evaluation yet")
    return {"title": values["title"] or folder.name, "config": values, "evaluations": evaluations}


def rows_of(records):
    """{label: records that differ in nothing but seed and machine}, in the order in which they come. The label is the
    title; where several experiments share one, what sets each apart from the first is added."""
    by_hash = {}
    for record in records:
        by_hash.setdefault(Config.from_dict(record["config"]).hash(), []).append(record)
    rows, first_of = {}, {}
    for group in by_hash.values():
        title, config = group[0]["title"], Config.from_dict(group[0]["config"])
        first = first_of.setdefault(title, config)
        apart = [f"{key}={ours}" for key, ours, _ in config.differences(first, (EXPERIMENT, SCHEDULE)) if key != "seed"]
        rows[", ".join([title, *apart])] = group
    return rows


def mean_sd(values, digits):
    """'1.2345 ± 0.0067' with the sample SD, or the value alone for n = 1."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table_of(rows):
    """Markdown, a line a row."""
    columns = [
        "run",
        "n",
        "best validation, nats",
        "bpc",
        "the papers' way, nats",
        "with aux. losses",
        "parameters (active)",
        "training, s",
        "characters/s",
    ]
    lines = ["| " + " | ".join(columns) + " |", "| --- " + "| ---: " * (len(columns) - 1) + "|"]
    for label, records in rows.items():
        first = records[0]
        mark = "" if is_comparable(first) else " †"
        lines.append(
            "| "
            + " | ".join(
                [
                    f"{label}, {first['dataset']['name']}{mark}",
                    str(len(records)),
                    mean_sd([record["clean"]["best"]["nats"] for record in records], 4),
                    mean_sd([record["clean"]["best"]["bpc"] for record in records], 4),
                    mean_sd([record["paper"]["best_val"] for record in records], 4),
                    mean_sd([record["paper"]["best_val_with_aux"] for record in records], 4),
                    f"{first['parameters']['total']:,} ({first['parameters']['active']:,})",
                    mean_sd([record["seconds"]["train"] for record in records], 1),
                    mean_sd([record["tokens_per_second"] for record in records], 0),
                ]
            )
            + " |"
        )
    return "\n".join(lines)


def machine_of(record):
    machine = record["machine"]
    return f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, {machine['dtype']}"


def summary_of(tables):
    """The page of all tables ({name: rows}), with what was run where."""
    page = [
        "# Measured results",
        "",
        "Written by `plot_results.py` from the records beside it; mean ± sample SD over n seeds. Best validation: the "
        "lowest cross-entropy over the whole validation split, each character predicted once, among the evaluations of "
        "the run. The papers' way: minimum over estimates from random batches; with the weighted auxiliary losses "
        "added, as some papers seem to have done. † not a canonical data set, or routing that sees later characters.",
        "",
    ]
    for table, rows in tables.items():
        machines = sorted({machine_of(record) for records in rows.values() for record in records})
        dirty = sum(record["git"]["dirty"] is not False for records in rows.values() for record in records)
        page += [
            f"## {table}",
            "",
            table_of(rows),
            "",
            f"Machine: {'; '.join(machines)}."
            + (f" {dirty} of the runs were made with uncommitted changes." if dirty else ""),
            "",
        ]
    return "\n".join(page)


def draw_curves(labelled, path, caption):
    """Loss against steps; labelled: {label: runs}. A thin line a seed, a thick one for their mean; dots: training
    batches."""
    figure, axes = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    for colour, (label, runs) in zip(itertools.cycle(COLOURS), labelled.items()):
        curves = {}
        for run in runs:
            steps = [line["step"] for line in run["evaluations"]]
            axes.plot(
                steps, [line["clean"]["nats"] for line in run["evaluations"]], color=colour, alpha=0.35, linewidth=0.8
            )
            for line in run["evaluations"]:
                curves.setdefault(line["step"], []).append((line["clean"]["nats"], line["paper"]["train"]))
        complete = sorted(step for step, values in curves.items() if len(values) == len(runs))
        validation, train = ([statistics.mean(value[i] for value in curves[step]) for step in complete] for i in (0, 1))
        axes.plot(complete, validation, color=colour, linewidth=2, label=f"{label} (n = {len(runs)})")
        axes.plot(complete, train, color=colour, linewidth=1.2, linestyle=":")
    axes.plot([], [], color="grey", linestyle=":", label="the same on training batches, eval mode")
    axes.set(xlabel="updates", ylabel="validation loss, nats per character")
    low = min(line["clean"]["nats"] for runs in labelled.values() for run in runs for line in run["evaluations"])
    later = [
        line["clean"]["nats"]
        for runs in labelled.values()
        for run in runs
        for line in run["evaluations"]
        if line["step"] > 0
    ]
    axes.set_ylim(low - 0.15, max(later, default=low + 1) + 0.15)
    axes.secondary_yaxis(
        "right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2))
    ).set_ylabel("bits per character")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def draw_latest(folders, output):
    runs = [read_run(Path(folder)) for folder in folders]
    labelled = rows_of(runs)
    draw_curves(
        labelled, output, "Cross-entropy over the whole validation split. Thin: one seed; thick: mean of the seeds."
    )
    print(f"wrote {output}")


def draw_results():
    tables = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        try:
            tables.setdefault(path.parent.name, []).append(read_record(path))
        except RecordError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not tables:
        where = f"{RESULTS.name}/ holds no records yet"
        raise RecordError(f"{where}: a complete run's summary.json, as results/TABLE/ROW-sSEED.json")
    tables = {name: rows_of(records) for name, records in tables.items()}
    for name, rows in tables.items():
        devices = ", ".join(sorted({record["machine"]["device"] for records in rows.values() for record in records}))
        path = RESULTS / f"{name}_curves.png"
        draw_curves(
            rows, path, f"Cross-entropy over the whole validation split, {devices}. Thin: one seed; thick: mean."
        )
        print(f"wrote {path.relative_to(ROOT)}")
    (RESULTS / "summary.md").write_text(summary_of(tables))
    print(f"wrote {(RESULTS / 'summary.md').relative_to(ROOT)}")


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python plot_results.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latest", nargs="+", metavar="OUT_DIR", help="draw these local runs instead of results/")
    parser.add_argument(
        "--output", metavar="FILE", default="curves.png", help="where --latest draws (default: curves.png)"
    )
    options = parser.parse_args(argv)
    if options.latest:
        draw_latest(options.latest, options.output)
    else:
        draw_results()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except RecordError as error:
        print(f"plot_results.py: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"plot_results.py: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
