"""Records -> tables, figures, verdicts, one page.

    python plot_results.py                          results/*/*.json -> results/{summary.md,page.html,tables,figures}
    python plot_results.py --check                  say what of it is stale, and write nothing
    python plot_results.py --latest out/A out/B …   curves of local runs, also while they train -> curves.png

A record is the summary.json of a complete run; in results/bench/, what bench.py measured; in results/analysis/, what
analyze.py found. What cannot be read, what
contradicts itself and what is not there is named, and the rest is drawn. The same records give the same bytes.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from analysis import analyses
from papers import experiments
from papers.experiments import CLAIMS, SCALES, TABLES, Comparison
from report import cells, figures, figures_of_run, figures_of_speed, figures_of_table, page, style, verdicts
from run import records
from run.records import RecordError
from run.settings import Config
from speed import bench_records
from support import console
from support.files import LARGEST_JSON, ROOT, one_line, read_json, read_whole
from support.options import EXPERIMENT, SCHEDULE
from support.schema import COUNT, FITS, NUMBER

DRAWN = ("tables", "figures")  # folders of results/ that are written here; the others hold records

# The figures of a table, in order.
FIGURES = {
    "B": ("loss_curves", "loss_against_cost", "relative_cost", "load_over_training"),
    "A": ("aux_decomposition", "loss_curves", "loss_against_cost", "relative_cost", "load_over_training"),
    "A_enwik8": ("aux_decomposition", "loss_curves", "loss_against_cost"),
    "A_text8": ("aux_decomposition", "loss_curves", "loss_against_cost"),
    "A_summary": (),
    "C": ("loss_curves", "load_over_training"),
    "D": ("loss_curves", "loss_against_cost"),
    "router": ("loss_curves",),
    "equal": ("loss_curves", "loss_against_cost"),
    "boundary": ("boundary_map",),
    "experts": ("load_by_row", "information_by_row", "stability_by_row", "ablation_by_row"),
}


class Part(NamedTuple):
    """What there is to say of one table at one scale on one kind of machine."""

    comparison: Comparison
    rulings: list[verdicts.Verdict]
    grids: list[page.Grid]
    pictures: dict[str, page.Picture]  # by file name
    shown: list[dict]  # an analysis or none, to be looked at by itself

    @property
    def title(self):
        table, scale = self.comparison.table, SCALES[self.comparison.scale]
        return f"{table.title} ({table.name}, {scale.title.partition(':')[0]})"

    @property
    def about(self):
        """What it is for, and under which conditions it was measured."""
        table, found = self.comparison.table, [r for of_row in self.comparison.cells.values() for r in of_row]
        of_records = [record for record in found if table.of == "records"]
        ranges = {
            "epochs": [round(record["epochs"], 2) for record in of_records],
            "unique characters": [record["dataset"]["splits"]["train"] for record in found],
            "parameters": [record["parameters"]["total"] for record in of_records],
        }
        regime = ", ".join(
            f"{min(values):,}{f' to {max(values):,}' if max(values) > min(values) else ''} {name}"
            for name, values in ranges.items()
            if values
        )
        regime = regime or "no run that counts"
        return f"{table.text} Source: {table.source}. Regime: {regime}. Machine: {self.comparison.machine}."


def part_of(comparison, number):
    """number: of the machine, among those on which this table was run at this scale."""
    table, scale = comparison.table, comparison.scale
    rulings = [
        verdicts.decide(claim, comparison) for claim in CLAIMS if claim.table == table.name and scale in claim.scales
    ]
    drawings = {name: figures.FIGURES[name](comparison) for name in (*FIGURES[table.name], "differences")}
    shown = shown_of(comparison)
    for analysis in shown:
        drawings |= figures_of_run.of_run(analysis)
    pictures = {}
    for name, drawing in drawings.items():
        if drawing:
            suffix = f"_{number}" if number > 1 else ""
            svg = style.svg(drawing.figure)
            pictures[f"{table.name}_{scale}_{name}{suffix}.svg"] = page.Picture(svg, drawing.caption, drawing.alt)
    return Part(comparison, rulings, [cells.grid_of(comparison, view) for view in table.views], pictures, shown)


def shown_of(comparison):
    """Of a table of analyses, the first one with text of a learned router, of the first row that has one."""
    found = [analysis for of_row in comparison.cells.values() for analysis in of_row]
    is_shown = comparison.table.of == "analyses"
    return [one for one in found if is_shown and one["sample"] and one["config"]["router"] == "learned"][:1]


def parts_of(found, analysed=()):
    """Of every table and scale of which something was run. found: records; analysed: analyses."""
    parts = []
    for scale in SCALES:
        for table in TABLES.values():
            cells = experiments.in_cells(table, found, analysed)
            for number, comparison in enumerate(experiments.gather(table, cells, scale), 1):
                if comparison.machine:
                    parts.append(part_of(comparison, number))
    return parts


def rulings_of(parts):
    """Every claim at every scale that it applies to, in the order of CLAIMS; those without a run too."""
    made = {}
    for part in parts:
        for verdict in part.rulings:
            made.setdefault((verdict.claim.id, part.comparison.scale), []).append(verdict)
    rulings = []
    for claim in CLAIMS:
        for scale in claim.scales:
            nothing = experiments.gather(TABLES[claim.table], [], scale)[0]
            rulings += made.get((claim.id, scale)) or [verdicts.decide(claim, nothing)]
    return rulings


class Bench(NamedTuple):
    """What there is to say of one bench."""

    record: dict
    grids: list[page.Grid]
    pictures: dict[str, page.Picture]  # by file name

    @property
    def title(self):
        return f"Speed ({bench_records.size_title(self.record)}, {self.record['machine']['device']})"

    @property
    def about(self):
        record, ceilings = self.record, self.record["ceilings"]
        doubts = [f"**{sentence}**" for sentence in bench_records.doubts(record)]
        limits = f"{rate(ceilings['flops_per_second'], 'FLOP/s')} and {rate(ceilings['bytes_per_second'], 'B/s')}"
        return " ".join(
            [
                *doubts,
                f"{bench_records.about(record)}. Every model is timed in turn with the others, in one process. "
                "A cell is the median of the timings [10th, 90th percentile]; time ÷ dense's is that of the ratios "
                "of pairs, above 1 where a model is slower. Of the floor: the least time for what must be computed "
                "and moved, at the "
                f"ceilings measured in the same bench ({limits}), over the time that it took.",
                f"Machine: {records.machine_of(record)}. The bench took {console.duration(record['seconds'])}.",
            ]
        )


def rate(value, unit):
    """'180 GFLOP/s'"""
    prefix, scale = ("T", 1e12) if value >= 1e12 else ("G", 1e9)
    return f"{bench_records.significant(value / scale)} {prefix}{unit}"


def benches_of(found):
    """found: records that bench_records.py read. Known sizes first; several of one size are numbered."""
    order = [*SCALES, *sorted({record["size"] for record in found} - {*SCALES})]
    benches, counts = [], {}
    for record in sorted(found, key=lambda record: (order.index(record["size"]), records.machine_of(record))):
        size = record["size"]
        counts[size] = counts.get(size, 0) + 1
        drawing, suffix = figures_of_speed.relative_time(record), f"_{counts[size]}" if counts[size] > 1 else ""
        pictures = {}
        if drawing:
            svg = style.svg(drawing.figure)
            pictures[f"speed_{size}{suffix}.svg"] = page.Picture(svg, drawing.caption, drawing.alt)
        benches.append(Bench(record, cells.speed_grids(record), pictures))
    return benches


# ---------------------------------------------------------------------------------------------------------------------
# In words


def lines_of(verdict, measure):
    """The effects on one measure, a line a pair of rows."""
    claim, comparison = verdict.claim, verdict.comparison
    table, lines = comparison.table, []
    for finding in verdict.findings[measure]:
        names = cells.labelled(comparison, table.row(finding.row))
        if finding.against:
            sign = {"difference": "−", "ratio": "÷"}[claim.effect]
            names += f" {sign} {cells.labelled(comparison, table.row(finding.against))}"
        lines.append(f"{names}: {verdicts.shown(finding.effect, measure, claim.effect)}")
    return lines


def details_of(verdict):
    """The effects behind a verdict; of the other measures where they disagree."""
    headings = {measure: experiments.MEASURES[measure].heading for measure in verdict.findings}
    first = verdict.claim.measures[0]
    lines = [f"{headings[first]}:", *lines_of(verdict, first)]
    for measure, status in verdict.dissent.items():
        lines += [f"but {status} by {headings[measure]}:", *lines_of(verdict, measure)]
    return lines


def effect_of(verdict):
    """What decided, in a line: the only effect, or the one that contradicts the claim most."""
    first, (lowest, highest) = verdict.claim.measures[0], verdict.claim.holds

    def contradiction(finding):
        mean = finding.effect.mean if finding.effect else 0
        return max(lowest - mean, mean - highest)

    deciding = [finding for finding in verdict.findings[first] if finding.status == verdict.status]
    finding = max(deciding, key=contradiction)
    text = verdicts.shown(finding.effect, first, verdict.claim.effect)
    label = cells.labelled(verdict.comparison, verdict.comparison.table.row(finding.row))
    if finding.effect and (len(verdict.findings[first]) > 1 or cells.DAGGER in label):
        text = f"{label}: {text}"
    if verdict.status == verdicts.NOT_RUN:
        text = f"`{verdict.comparison.table.command(verdict.comparison.scale)}`"
        if all(verdict.comparison.cells[name] for pair in verdict.claim.pairs for name in pair if name):
            text = "run, but none is known to have been alone on its cores"
    dissent = [f"{status} by {experiments.MEASURES[measure].heading}" for measure, status in verdict.dissent.items()]
    return "; but ".join([text, *dissent])


def status_of(verdict):
    return verdict.status + (f" (provisional, n = {verdict.seeds})" if verdict.is_provisional else "")


def headline(parts, found):
    """What was run, and where."""
    if not found:
        return "There are no records yet; each line below says how to make them."
    machines = sorted({part.comparison.machine for part in parts})
    return (
        f"Records of {len(found)} runs, made on {' and on '.join(machines)}. A verdict from fewer than "
        f"{experiments.SEEDS_FOR_A_VERDICT} seeds is provisional."
    )


def counted(rulings):
    count = {status: sum(verdict.status == status for verdict in rulings) for status in verdicts.STATUSES}
    return f"Of {len(rulings)} verdicts: " + ", ".join(f"{number} {status}" for status, number in count.items()) + "."


HOW_TO_READ = (
    "Losses are nats per character, in eval mode where nothing else is said. **Clean**: the whole validation split, "
    "each character predicted once. **The papers' way**: the minimum over evaluations of the mean of random "
    "batches; auxiliary losses are added only where that is said. A cell is mean ± sample SD (n seeds). An effect "
    "comes with its 95% interval: Welch's over seeds, or the paired one over common seeds for what is estimated "
    "from random batches, which rows of one seed share. A claim held where the whole interval lies where its rule "
    "says, did not hold where none of it does, and is within noise otherwise; of several pairs, one that "
    "contradicts is enough. Intervals are not corrected for the number of claims. Times count only from runs that "
    "had their cores, or their GPU, to themselves, up to 5% of the cores' time."
)


def summary_of(parts, rulings, benches, found, left_out):
    """results/summary.md"""
    page = ["# Measured results", "", "Written by `plot_results.py` from the records beside it.", ""]
    page += [headline(parts, found), "", HOW_TO_READ, "", "## Verdicts", "", counted(rulings), ""]
    page += ["| | claim | scale | verdict | effect |", "| --- | --- | --- | --- | --- |"]
    several = len({part.comparison.machine for part in parts}) > 1
    for verdict in rulings:
        claim, comparison = verdict.claim, verdict.comparison
        where = comparison.scale + (f", {comparison.machine}" if several and comparison.machine else "")
        page.append(f"| {claim.id} | {claim.sentence} | {where} | {status_of(verdict)} | {effect_of(verdict)} |")
    page += [""]
    for part in parts:
        page += [f"## {part.title}", "", part.about, "", *grid_lines(part), *picture_lines(part)]
    for bench in benches:
        page += [f"## {bench.title}", "", bench.about, "", *picture_lines(bench), *grid_lines(bench)]
    page += left_out_lines(left_out)
    return "\n".join(page).rstrip() + "\n"


def grid_lines(part):
    return [line for grid in part.grids for line in (cells.markdown(grid), "")]


def picture_lines(part):
    lines = []
    for name, picture in part.pictures.items():
        lines += [f"![{picture.alt}](figures/{name})", "", picture.caption, ""]
    return lines


def left_out_lines(left_out):
    return ["## Records left out", "", *(f"- {why}" for why in left_out)] if left_out else []


def report_of(parts, rulings, benches, found, left_out):
    """results/report.html"""
    sections = []
    for part in parts:
        blocks = [page.Text(part.about), *explanation_of(part), *part.grids, *part.pictures.values()]
        blocks += [passage for analysis in part.shown for passage in passages_of(analysis)]
        blocks += [ruling_of(verdict) for verdict in part.rulings]
        sections.append(page.Section(part.title, blocks))
    for bench in benches:
        blocks = [page.Text(bench.about), *bench.pictures.values(), *bench.grids]
        sections.append(page.Section(bench.title, blocks))
    alone = [verdict for verdict in rulings if not verdict.comparison.machine]
    if alone:
        sections.append(page.Section("Not run yet", [ruling_of(verdict) for verdict in alone]))
    if left_out:
        sections.append(page.Section("Records left out", [page.Text(why) for why in left_out]))
    lead = [page.Text(headline(parts, found)), page.Text(HOW_TO_READ)]
    return page.page("charmoe: what was measured", lead, sections)


HOW_EXPERTS_ARE_READ = (
    "A Mixture-of-Experts layer has several MLPs, its experts, and a router that sends each character to one or a few "
    "of them. **Load** is how evenly they are used: a layer whose characters all go to one expert has collapsed, and "
    "uses 0 of what it could; one whose experts have equal shares uses 1.",
    "**Information** is what knowing something of a character tells of its expert, as a share of all there is to know "
    "(H(expert), the entropy of the load). If each character always goes to the same expert, the character tells 1. A "
    "share means nothing by itself: a random, never trained router also sends like to like, and any table tells "
    "something of anything by chance. So chance is subtracted, and the random router is drawn beside it. What the "
    "characters before, the place in the word, or the speaker add is counted beyond the character.",
    "**Cost** is what the validation loss rises by, in nats, when the routing of the trained model is spoilt or an "
    "expert is taken away. **Gradients**: a cosine of 1 means that two wishes to change the weights agree, −1 that "
    "they are opposed, 0 that they have nothing to do with each other.",
)


def explanation_of(part):
    """For a reader who meets experts for the first time."""
    return [page.Text(text) for text in HOW_EXPERTS_ARE_READ if part.comparison.table.of == "analyses"]


def passages_of(analysis):
    """What the model writes, each character on the colour of its expert, in every layer with experts."""
    blocks = []
    for layer, experts in zip(analysis["layers"], analysis["sample"]["experts"]):
        title = f"Block {layer['block']}: text written by the model, each character on the colour of its expert"
        blocks.append(page.Passage(title, analysis["sample"]["text"], experts, layer["n_expert"]))
    label = f"Written by {analysis['title']}, seed {analysis['config']['seed']}"
    return [page.Text(f"**{label}**, as `python sample.py --show_experts` shows it."), *blocks] if blocks else []


def ruling_of(verdict):
    claim, table = verdict.claim, verdict.comparison.table
    return page.Ruling(
        claim.id,
        verdict.status,
        claim.sentence,
        effect_of(verdict),
        source="" if claim.source == table.source and verdict.comparison.machine else claim.source,
        details=details_of(verdict) if verdict.comparison.machine else [],
        notes=[verdicts.rule(claim)],
        provisional=verdict.is_provisional,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


def collect(folder):
    """(the records that belong to a row of a table, such analyses, the benches, a line for everything else)"""
    if not folder.is_dir():
        return [], [], [], [f"{folder} is not there, so there are no records"]
    pairs, left_out = records.read_all(folder)
    benches, of_benches = bench_records.read_all(folder)
    analysed, of_analyses = analyses.read_all(folder)
    left_out += of_benches + of_analyses
    hashes = {
        row.config_at(scale).hash() for table in TABLES.values() for scale in SCALES for row in table.rows_at(scale)
    }
    found = []
    for path, record in pairs:
        if experiments.hash_of(record) in hashes:
            found.append(record)
        else:
            left_out.append(f"{path.relative_to(folder.parent)}: its config is that of no row of a table")
    for path in sorted([*folder.glob("*.json"), *folder.glob("*/*/*.json")]):
        left_out.append(
            f"{path.relative_to(folder.parent)}: not in a table's folder, {folder.name}/TABLE/ROW-sSEED.json"
        )
    for analysis in analysed:
        if experiments.hash_of(analysis) not in hashes:
            left_out.append(
                f"{folder.name}/{records.ANALYSIS}: {analysis['title']}: its config is that of no row of a table"
            )
    left_out = left_out or ([] if found or benches or analysed else [f"{folder} holds no records yet"])
    return found, analysed, [record for _, record in benches], list(map(one_line, left_out))


def outputs_of(folder):
    """({path under `folder`: its text}, what was left out)"""
    found, analysed, measured, left_out = collect(folder)
    parts, benches = parts_of(found, analysed), benches_of(measured)
    rulings = rulings_of(parts)
    outputs = {"summary.md": summary_of(parts, rulings, benches, found, left_out)}
    outputs["report.html"] = report_of(parts, rulings, benches, found, left_out)
    for part in [*parts, *benches]:
        outputs |= {f"figures/{name}": picture.svg for name, picture in part.pictures.items()}
    by_table = {}
    for part in parts:
        by_table.setdefault((part.comparison.table.name, part.comparison.scale), []).append(part)
    for (table, scale), of in by_table.items():
        outputs[f"tables/{table}_{scale}.csv"] = cells.csv_of([part.comparison for part in of])
        grids = [cells.latex(grid) for part in of for grid in part.grids]
        outputs[f"tables/{table}_{scale}.tex"] = "\n\n".join(grids) + "\n"
    for size in dict.fromkeys(bench.record["size"] for bench in benches):
        of = [bench for bench in benches if bench.record["size"] == size]
        outputs[f"tables/speed_{size}.csv"] = cells.speed_csv([bench.record for bench in of])
        grids = [cells.latex(grid) for bench in of for grid in bench.grids]
        outputs[f"tables/speed_{size}.tex"] = "\n\n".join(grids) + "\n"
    return outputs, left_out


def superfluous(folder, outputs):
    """What has a name of ours where we write, and was not written for these records."""
    drawn = rf"({'|'.join(TABLES)})_({'|'.join(SCALES)})(_\w+)?|speed_[\w-]+"
    ours = re.compile(rf"(tables|figures)/({drawn})\.(csv|tex|svg)")
    there = {path.relative_to(folder).as_posix() for name in DRAWN for path in (folder / name).glob("*")}
    return sorted(name for name in there - outputs.keys() if ours.fullmatch(name))


def check(folder, outputs):
    """What of `folder` is not what plot_results.py would write, a line each."""
    lines = [f"{name} is drawn from nothing any more" for name in superfluous(folder, outputs)]
    for name, text in outputs.items():
        path = folder / name
        if not path.is_file():
            lines.append(f"{name} is missing")
        elif path.read_bytes() != text.encode():
            lines.append(f"{name} is out of date")
    return lines


def write(folder, outputs):
    for name in superfluous(folder, outputs):
        print(f"removed {name}, which is drawn from nothing any more")
        (folder / name).unlink()
    for name, text in outputs.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())


# ---------------------------------------------------------------------------------------------------------------------
# Local runs, finished or not


def read_json_lines(path):
    """The whole lines of a file that may be growing."""
    lines = []
    text = read_whole(path, LARGEST_JSON).decode(errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except (ValueError, RecursionError):
            print(f"{path}:{number}: not a whole line of JSON, left out", file=sys.stderr)
    return lines


def read_run(folder):
    """A run, finished or not, as the part of a record that curves need."""
    config, metrics = folder / "config.json", folder / "metrics.jsonl"
    if not config.is_file() or not metrics.is_file():
        raise RecordError(f"{folder}: holds no run (no config.json with a metrics.jsonl)")
    try:
        values = Config.from_dict(read_json(config), origin=str(config)).to_dict()
        evaluations = [line for line in read_json_lines(metrics) if is_evaluation(line)]
    except OSError as error:
        raise RecordError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecordError(f"{config}: not the config of a run ({error})") from None
    if not evaluations:
        raise RecordError(f"{folder}: has no evaluation yet")
    return {"title": values["title"] or folder.name, "config": values, "evaluations": evaluations}


def is_evaluation(line):
    """Whether a line of metrics.jsonl has what the curves need."""
    try:
        numbers = line["clean"]["nats"], line["paper"]["train"], line.get("train_seconds", 0.0)
        return line["kind"] == "eval" and FITS[COUNT](line["step"]) and all(map(FITS[NUMBER], numbers))
    except (AttributeError, KeyError, TypeError):
        return False


def labelled(runs):
    """{label: runs that differ in nothing but seed and machine}, in the order in which they come. The label is the
    title; where several experiments share one, what sets each apart from the first is added."""
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


def draw_latest(folders, output):
    """One picture of those runs that have something to show; the others are named."""
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(Path(folder)))
        except RecordError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise RecordError("none of these folders holds a run with an evaluation")
    style.png(figures_of_table.curves_of_runs(labelled(runs)).figure, output)
    print(f"wrote {output}")


def main(argv):
    parser = argparse.ArgumentParser(
        prog="python plot_results.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", metavar="DIR", type=Path, default=ROOT / "results", help="the folder of records")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is stale")
    parser.add_argument("--latest", nargs="+", metavar="OUT_DIR", help="draw these local runs instead of results/")
    parser.add_argument(
        "--output", metavar="FILE", default="curves.png", help="where --latest draws (default: curves.png)"
    )
    options = parser.parse_args(argv)
    if options.latest:
        draw_latest(options.latest, options.output)
        return 0
    outputs, left_out = outputs_of(options.results)
    for why in left_out:
        print(f"left out: {why}", file=sys.stderr)
    shown = os.path.relpath(options.results)
    if options.check:
        lines = check(options.results, outputs)
        for line in lines:
            print(f"{shown}/{line}")
        print("run python plot_results.py" if lines else f"{shown}/ is up to date")
        return 1 if lines or left_out else 0
    write(options.results, outputs)
    print(f"wrote {shown}/report.html, summary.md and {len(outputs) - 2} tables and figures")
    return 0


if __name__ == "__main__":
    console.run(main, (RecordError,))
