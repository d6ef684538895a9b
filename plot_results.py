"""Records -> tables, figures, verdicts, one page.

    python plot_results.py                          results/*/*.json -> results/{summary.md,report.html,tables,figures}
    python plot_results.py --check                  name what is stale, and write nothing
    python plot_results.py --latest out/A out/B …   curves of local runs, also while they train -> curves.png

A record is the summary.json of a complete run; results/bench/ holds records of bench.py, results/analysis/ those of
analyze.py. Files that cannot be read, that contradict themselves or that belong to no table are named, and the rest is
drawn. The same records give the same bytes.
"""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

import papers
from analysis import analyses
from papers.table import SCALES, config_hash
from report import cells, figures_of_table, latest, speed_cells, style
from report.sections import Results, results_of
from report.summary import report_html, summary_markdown
from run import records
from run.records import RecordError
from speed import bench_records
from support import console
from support.files import ROOT, expanded, one_line

DRAWN = ("tables", "figures")  # folders of results/ that are written here; the others hold records


def gather_results(folder: Path) -> Results:
    """The results that the records under a folder give. RecordError where all it holds is of no table."""
    if not folder.is_dir():
        return results_of([], [], [], [f"{folder} is not there, so there are no records"])
    pairs, left_out = records.read_all(folder)
    benches, of_benches = bench_records.read_all(folder)
    analysed, of_analyses = analyses.read_all(folder)
    left_out += of_benches + of_analyses
    rows = [(row, scale) for table in papers.TABLES.values() for scale in SCALES for row in table.experiments_at(scale)]
    hashes = {row.config_at(scale).hash() for row, scale in rows}
    in_no_table = "no table has a row of its config"
    named = [(path.relative_to(folder.parent), record) for path, record in pairs]
    named += [(f"{folder.name}/{records.ANALYSIS}: {analysis['title']}", analysis) for analysis in analysed]
    left_out += [f"{name}: {in_no_table}" for name, record in named if config_hash(record) not in hashes]
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*/*.json")]):
        place = f"{folder.name}/TABLE/ROW-sSEED.json"
        left_out.append(f"{path.relative_to(folder.parent)}: not in a table's folder, {place}")
    found = [record for _, record in pairs if config_hash(record) in hashes]
    runs = [*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")]
    if (runs or pairs) and not (found or benches or analysed):
        raise RecordError(own_runs_text(folder, runs))
    if not (left_out or found or benches or analysed):
        left_out = [f"{folder} holds no records yet"]
    return results_of(found, analysed, [record for _, record in benches], list(map(one_line, left_out)))


def own_runs_text(folder: Path, runs: list[Path]) -> str:
    """What --results is for, and how to draw other runs. runs: the metrics.jsonl of those in the folder."""
    shown = os.path.relpath(folder)
    places = {path.parent == folder: shlex.quote(shown) + ("" if path.parent == folder else "/*") for path in runs}
    command = f"python {shlex.quote(os.path.relpath(__file__))} --latest {' '.join(places.values()) or 'OUT_DIR …'}"
    purpose = "--results draws tables, from a folder of records like results/ (TABLE/ROW-sSEED.json)"
    return f"{shown}: {purpose}, and no table has a row of what is in here. For curves of your own runs: {command}"


def outputs_of(results: Results) -> dict[str, str]:
    """Path under results/ -> the text of that file."""
    outputs = {"summary.md": summary_markdown(results), "report.html": report_html(results)}
    tables, speeds = {}, {}  # the sections that share a file
    for section in results.sections:
        tables.setdefault(f"tables/{section.comparison.table.name}_{section.comparison.scale}", []).append(section)
    for bench in results.benches:
        speeds.setdefault(f"tables/speed_{bench.record['size']}", []).append(bench)
    for name, of in tables.items():
        outputs[f"{name}.csv"] = cells.csv_of([section.comparison for section in of])
    for name, of in speeds.items():
        outputs[f"{name}.csv"] = speed_cells.speed_csv([bench.record for bench in of])
    for name, of in {**tables, **speeds}.items():
        outputs[f"{name}.tex"] = "\n\n".join(cells.latex(grid) for section in of for grid in section.grids) + "\n"
        for section in of:
            outputs |= {f"figures/{name}": picture.svg for name, picture in section.pictures.items()}
    return outputs


def superfluous(folder: Path, outputs: dict[str, str]) -> list[str]:
    """Files with names of ours, in folders where we write, that these records do not give."""
    drawn = rf"({'|'.join(papers.TABLES)})_({'|'.join(SCALES)})(_\w+)?|speed_[\w-]+"
    ours = re.compile(rf"(tables|figures)/({drawn})\.(csv|tex|svg)")
    there = {path.relative_to(folder).as_posix() for name in DRAWN for path in (folder / name).glob("*")}
    return sorted(name for name in there - outputs.keys() if ours.fullmatch(name))


def stale(folder: Path, outputs: dict[str, str]) -> list[str]:
    """A line for each file of `folder` that is not as plot_results.py would write it."""
    lines = [f"{name} is given by no record any more" for name in superfluous(folder, outputs)]
    for name, text in outputs.items():
        path = folder / name
        if not path.is_file():
            lines.append(f"{name} is missing")
        elif path.read_bytes() != text.encode():
            lines.append(f"{name} is out of date")
    return lines


def write_outputs(folder: Path, outputs: dict[str, str]) -> None:
    for name in superfluous(folder, outputs):
        print(f"removed {name}, which no record gives any more")
        (folder / name).unlink()
    for name, text in outputs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


def draw_latest(folders: list[Path], output: Path) -> None:
    """One picture of the local runs that have an evaluation; the others are named."""
    runs, left_out = latest.read_runs(folders)
    tell_left_out(left_out)
    if not runs:
        raise RecordError("none of these folders holds a run with an evaluation")
    style.png(figures_of_table.curves_of_runs(latest.grouped(runs)).figure, output)
    print(f"wrote {output}")


def tell_left_out(lines):
    for why in lines:
        print(f"left out: {why}", file=sys.stderr)


def main(argv):
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python plot_results.py", description=__doc__, formatter_class=as_written)
    parser.add_argument(
        "--results",
        metavar="DIR",
        type=expanded,
        default=ROOT / "results",
        help="the folder of records, as sweep.py fills it",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is stale")
    parser.add_argument(
        "--latest", nargs="+", metavar="OUT_DIR", type=expanded, help="draw these local runs instead of results/"
    )
    where = "where --latest draws (default: curves.png)"
    parser.add_argument("--output", metavar="FILE", type=expanded, default="curves.png", help=where)
    options = parser.parse_args(argv)
    if options.latest:
        draw_latest(options.latest, options.output)
        return 0
    results = gather_results(options.results)
    outputs = outputs_of(results)
    tell_left_out(results.left_out)
    shown = os.path.relpath(options.results)
    if options.check:
        lines = stale(options.results, outputs)
        for line in lines:
            print(f"{shown}/{line}")
        print("run python plot_results.py" if lines else f"{shown}/ is up to date")
        return 1 if lines or results.left_out else 0
    write_outputs(options.results, outputs)
    print(f"wrote {shown}/report.html, summary.md and {len(outputs) - 2} tables and figures")
    return 0


if __name__ == "__main__":
    console.run(main)
