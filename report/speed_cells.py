"""Fills the tables of a bench, and sets the published speeds beside its own.

    speed_grids(bench); speed_csv(benches)  # of records that bench_records.py reads

A cell is the median of the timings, with their 10th and 90th percentile.
"""

from papers import TABLES
from papers.table import SCALES, Row
from report.blocks import Grid
from report.cells import NOTHING, csv_text, published_ratio_cell
from run import records
from speed import bench_records
from speed.bench_records import DENSE, config_of

PUBLISHED = TABLES["B"]  # the one paper that prints times
PUBLISHED_ROWS = [row for row in PUBLISHED.rows if row.published]
TASKS = {  # task -> (title, heading of its time)
    "train": ("Training: one update", "ms an update"),
    "prefill": ("Reading a prompt of half the context", "ms a batch"),
    "decode": ("Decoding: a step gives each sequence a character", "ms a step"),
}


def speed_grids(bench: dict) -> list[Grid]:
    """The tables of a bench: one per task that it measured, and one of the models and backends."""
    grids = [task_grid(bench, task) for task in TASKS if bench_records.batch_sizes(bench, task)]
    grids += [papers_grid(bench)] if bench_records.batch_sizes(bench, "papers") else []
    return [*grids, what_ran_grid(bench)]


def task_grid(bench, task):
    """A row per batch size and model: time, ratio to dense, speed, floor over time."""
    title, time = TASKS[task]
    found, batches = bench_records.measurements_of(bench), bench_records.batch_sizes(bench, task)
    columns = ["time ÷ dense's", time]
    columns += ["characters/s"] if batches == [1] or task == "train" else ["characters/s a sequence", "in total"]
    columns.append("floor ÷ time")
    has_memory = any(one["peak_memory_bytes"] is not None for one in found.values())
    columns += ["peak memory, MiB"] if has_memory else []
    rows = []
    for batch in batches:
        for name, model in bench["models"].items():
            if (name, task, batch) in found:
                label = model["title"] + (f", batch {batch}" if len(batches) > 1 else "")
                cells = speed_cells(found[name, task, batch])
                rows.append([label, *(cells[column] for column in columns)])
    counts = [one["seconds"]["n"] for one in found.values() if one["task"] == task]
    notes = [f"n = {bench_records.from_to(counts)} timings each"]
    notes += bench_records.note_of_references(bench) if task == "decode" else []
    return Grid(f"Speed. {title}", ["model", *columns], rows, notes)


def speed_cells(one):
    """Heading -> cell of one measurement."""
    total, seconds, peak = one["tokens_per_second"], one["seconds"], one["peak_memory_bytes"]
    return {
        **{heading: bench_records.spread_text(seconds, 1000) for _, heading in TASKS.values()},
        "time ÷ dense's": ratio_cell(one),
        **dict.fromkeys(("characters/s", "in total"), f"{total:,.0f}"),
        "characters/s a sequence": f"{total / one['batch_size']:,.0f}",
        "floor ÷ time": f"{one['floor']['seconds'] / seconds['median']:.1%}",
        "peak memory, MiB": NOTHING if peak is None else f"{peak / 2**20:,.0f}",
    }


def papers_grid(bench):
    """Speeds measured as the papers do, beside the published ones. Last come published rows without a model here."""
    found, size = bench_records.measurements_of(bench), "" if bench["size"] == "paper" else " (paper size)"
    columns = ["characters/s", "speed ÷ dense's", "training time ÷ dense's"]
    theirs = ("characters/s", "speed ÷ baseline's", "training time ÷ baseline's")
    columns += [f"published: {column}{size}" for column in theirs]
    row_of = {name: published_row(model) for name, model in bench["models"].items()}
    titles = {name: model["title"] for name, model in bench["models"].items()}
    rows = [[title, *papers_cells(found, name), *published_cells(row_of[name])] for name, title in titles.items()]
    alone = [row for row in PUBLISHED_ROWS if row not in row_of.values()]
    rows += [[f"{row.label}, published", *[NOTHING] * 3, *published_cells(row)] for row in alone]
    timings = [(one["seconds"]["n"], one["tokens"]) for one in found.values() if one["task"] == "papers"]
    counts, lengths = map(bench_records.from_to, zip(*timings))
    notes = [f"n = {counts} texts of {lengths} characters; training time is that of the updates"]
    notes += [f"published: {PUBLISHED.source}, one machine, number of runs not given"]
    same = [f"{titles[name]} is {row.label}" for name, row in row_of.items() if row]
    notes += [f"as published: {'; '.join(same)}"] if same else []
    title = "Speed. Inference by the papers' protocol: eagerly, without a cache, one text at a time"
    return Grid(title, ["model", *columns], rows, notes)


def papers_cells(found, name):
    """Inference speed by the papers' protocol, its ratio to dense's, and the ratio of training times, of one model."""
    wrote = found.get((name, "papers", 1))
    trained = next((one for key, one in found.items() if key[:2] == (name, "train")), None)
    total = f"{wrote['tokens_per_second']:,.1f}" if wrote else NOTHING
    return [total, ratio_cell(wrote, bench_records.inverse_ratio), ratio_cell(trained)]


def ratio_cell(one, turned=dict):
    """The ratio of a measurement to dense's; 1 for dense."""
    if one is None:
        return NOTHING
    return bench_records.spread_text(turned(one["ratio"])) if one["ratio"] else "1"


def published_cells(row):
    """Published inference speed, its ratio to the baseline's, and the ratio of training times."""
    if row is None:
        return [NOTHING] * 3
    ratios = [published_ratio_cell(PUBLISHED, row, measure) for measure in ("inference_speed", "train_seconds")]
    return [f"{row.published['inference_speed']:,.1f}", *ratios]


def what_ran_grid(bench):
    """The models, the backends that ran them, and the checks against the reference."""
    rows, checks = [], {}
    for model in bench["models"].values():
        counts, backend = model["parameters"], model["backend"]
        seconds = [model["compile_seconds"][task] for task in ("train", "decode")]
        compiling = " / ".join(NOTHING if value is None else f"{value:.1f}" for value in seconds)
        cells = [f"{counts['total']:,}", f"{counts['active']:,}", backend["train"], backend["decode"], compiling]
        rows.append([model["title"], *cells, str(len(model["checks"]))])
        for check in model["checks"]:
            checks.setdefault(check["what"], []).append(check)
    notes = []
    for what, of in checks.items():
        worst = max(of, key=lambda check: check["error"] / check["limit"] if check["limit"] else 0)
        errors = f"largest error {worst['error']:.1e}, allowed {worst['limit']:.0e} (n = {len(of)})"
        notes.append(f"checked, {what}: {errors}")
    columns = ["model", "parameters", "active per character", "training ran on", "decoding ran on"]
    columns += ["compiling: training / decoding, s", "checks passed"]
    return Grid("Speed. Models, backends and checks", columns, rows, notes)


SPEED_COLUMNS = (
    "size", "machine", "commit", "uncommitted_changes", "alone", "model", "title", "task", "batch_size", "characters",
    "seconds", "seconds_p10", "seconds_p90", "n", "ratio", "ratio_p10", "ratio_p90", "ratio_n",
    "characters_per_second", "floor_seconds", "peak_memory_bytes",
)  # fmt: skip


def speed_csv(benches: list[dict]) -> str:
    """Every measurement, unrounded; unknown values are empty."""
    lines = []
    for bench in benches:
        git, alone = bench["git"], bench_records.is_undisturbed(bench)
        place = bench["size"], records.machine_of(bench), git["commit"], git["dirty"], alone
        for one in bench["measurements"]:
            ratio = one["ratio"] or dict.fromkeys(("median", "p10", "p90", "n"))
            title = bench["models"][one["model"]]["title"]
            spreads = [spread[key] for spread in (one["seconds"], ratio) for key in ("median", "p10", "p90", "n")]
            subject = one["model"], title, one["task"], one["batch_size"], one["tokens"]
            lines.append(
                [
                    *place,
                    *subject,
                    *spreads,
                    one["tokens_per_second"],
                    one["floor"]["seconds"],
                    one["peak_memory_bytes"],
                ]
            )
    return csv_text(SPEED_COLUMNS, lines)


# ---------------------------------------------------------------------------------------------------------------------
# Published rows, and the bench in words


def published_row(model) -> Row | None:
    """The published row with the same kind of model, or None."""
    ours = kind_of(config_of(model))
    return next((row for row in PUBLISHED_ROWS if kind_of(row.config_at("paper")) == ours), None)


def kind_of(config):
    """The keys of a config in which the published rows differ; None for a dense model."""
    if not config.n_expert:
        return None
    return config.n_expert, config.expert_kind, config.router, config.expert_top_k, config.capacity_factor


def bench_headline(record) -> str:
    """A bench in one line: "CPU size: 4 layers, 128 wide, context 64, commit 0123456"."""
    size, commit = size_title(record["size"]), record["git"]["commit"]
    config = config_of(record["models"][DENSE])
    shape = f"{config.n_layer} layers, {config.n_embd} wide, context {config.block_size}"
    return f"{size[0].upper()}{size[1:]}: {shape}, " + (f"commit {commit[:7]}" if commit else "commit not known")


def size_title(size) -> str:
    """'CPU size'"""
    return SCALES[size].partition(":")[0] if size in SCALES else f"size {size}"
