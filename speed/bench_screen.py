"""The tables that bench.py prints, and the lines under them. Needs no torch."""

from speed.bench_records import DENSE, compare, is_undisturbed, others_share, significant

HEADINGS = {
    "train": "training step, {B} × {T} characters",
    "prefill": "prefill, {B} × {T} characters",
    "decode": "decode step, batch {B}",
    "papers": "uncached sampling, {T} characters",
}


def table_lines(rows, titles):
    """One task's measurements as a table, in a unit that suits the dense model; titles: {name: title} of models."""
    first, median = rows[0], next(row for row in rows if row["model"] == DENSE)["seconds"]["median"]
    unit, scale = ("µs", 1e6) if median < 1e-3 else ("ms", 1e3) if median < 1 else ("s", 1)
    heading = HEADINGS[first["task"]].format(B=first["batch_size"], T=first["tokens"] // first["batch_size"])
    memory = "  memory" if first["peak_memory_bytes"] is not None else ""
    yield (
        f"{heading:<36}{unit:>8} {'p10–p90':>15}  {'× dense':>7} {'p10–p90':>11}  {'tokens/s':>9} {'in total':>9}"
        f"  {'of floor':>8}  {'n':>3}{memory}"
    )
    for row in rows:
        seconds, ratio, total = row["seconds"], row["ratio"], row["tokens_per_second"]
        median, *ends = (significant(scale * seconds[key]) for key in ("median", "p10", "p90"))
        speeds, reached = (total / row["batch_size"], total), row["floor"]["seconds"] / seconds["median"]
        ratio, *ratio_ends = (f"{ratio[key]:.2f}" for key in ("median", "p10", "p90")) if ratio else ("1", "")
        yield (
            f"  {titles[row['model']]:<34}{median:>8} {'–'.join(ends):>15}  {ratio:>7} {'–'.join(ratio_ends):>11}"
            f"  {significant(speeds[0]):>9} {significant(speeds[1]):>9}  {reached:>8.1%}"
            f"  {seconds['n']:>3}" + (f" {gb(row['peak_memory_bytes']):>7}" if memory else "")
        )


def legend_lines(record):
    """What ran, how it was checked, the ceilings and the load by other programs."""
    if record.get("flags"):
        yield f"Flags: {', '.join(record['flags'])}"
    yield "What ran, and its largest error in a check:"
    for model in record["models"].values():
        backend, checks, seconds = model["backend"], model["checks"], model["compile_seconds"].items()
        compiling = [f"{value:,.0f} s for {task}" for task, value in seconds if value is not None]
        yield f"  {model['title']:<26}training: {backend['train']}; decoding: {backend['decode']}"
        if compiling:
            yield f"  {'':<26}compiled in {', '.join(compiling)}"
        if checks:
            row = max(checks, key=lambda row: row["error"] / row["limit"])
            yield f"  {'':<26}{row['what']}: {row['error']:.1g}, at most {row['limit']:.1g} expected"
    if record.get("attention"):
        yield f"Attention in prefill and uncached sampling: {record['attention']}"
    ceilings, machine = record["ceilings"], record["machine"]
    yield (
        f"Floor: {ceilings['flops_per_second'] / 1e9:,.0f} GFLOP/s of matrix products in {machine['dtype']}, and "
        f"{ceilings['bytes_per_second'] / 1e9:,.0f} GB/s of reading or copying as much as the dense model's weights"
    )
    yield f"Other programs meanwhile: {other_load_text(record)}"


def other_load_text(record):
    """Which part of the machine other programs took."""
    share, held = others_share(record), record["others"]["device_bytes"]
    if record["machine"]["device_type"] == "cuda":
        found = "not known" if held is None else f"held up to {gb(held)} of the device's memory"
    else:
        found = "not known" if share is None else f"took {share:.1%} of the cores' time"
    return found + ("" if is_undisturbed(record) else "; trust the ratios, which are paired, and not the times")


def comparison_lines(path, old, new):
    """What became slower than in the record at `path`, and what cannot be compared."""
    worse, missing = compare(old, new)
    before, now = (", ".join(record.get("flags", [])) or "none" for record in (old, new))
    if before != now:
        yield f"Flags: {now}, was {before}."
    yield f"Slower than {path}:" if worse else f"Nothing became slower than in {path}, as far as it can be compared."
    yield from (f"  {line}" for line in worse)
    if missing:
        yield "Not compared:"
        yield from (f"  {line}" for line in missing)


def gb(count):
    return f"{count / 1e9:.2g} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"
