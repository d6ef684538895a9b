"""Measure what a run's router has learned: load, specialisation, stability, gradients, ablations.

    python analyze.py out/shakespeare_moe4-cpu-s1337
    python analyze.py out/*-cpu-s*/ --results=results    also keeps the analyses for plot_results.py
    python analyze.py out/… --ablation=False             without the slowest part

Reads the run's last weights and the start of its validation split. Writes analysis.json and
analysis_*.svg into the run's folder, and prints a short summary. For runs trained with --save_every,
the routing is followed over training. A dense model has no router; its loss by class and its
gradients are measured, for comparison with experts.

Exit codes: 0 done; 1 some of several folders could not be analysed, and were named; 2 a mistake in
the command.
"""

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from analysis import ablation, analyses, parts, probe
from analysis.analysed_run import AnalysedRun
from analysis.annotation import CONTEXT, TOPIC, name_of
from report import figures_of_run, style
from run import records, run_folder
from support import configurator, console, files, machines
from support.files import UserError
from support.options import ConfigError, option

DRAWING = ("report/", "papers/")  # code of ours that draws an analysis, and changes nothing in it


@dataclass(frozen=True)
class Options:
    """Keys that may follow the folders."""

    checkpoint: Literal["last", "best"] = option("last", "ckpt.pt, or best.pt (lowest validation loss)")
    characters: int = option(
        200_000, "characters read from the start of the validation split, in whole batches; 0: all", at_least=0
    )
    pass_characters: int = option(
        16_000, "characters for ablation and stability, which read them many times; 0: all", at_least=0
    )
    ablation: bool = option(True, "measure the loss without experts, and with altered routing")
    gradient_batches: int = option(8, "batches of the training split; 0: no gradients", at_least=0, at_most=10_000)
    sample_characters: int = option(
        400, "length of a text written by the model, with its experts; 0: none", at_least=0, at_most=100_000
    )
    results: str = option(
        "", "folder in which to keep the analysis too, as analysis/RUN.json, for plot_results.py", is_path=True
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "precision of matrix products")
    seed: int = option(0, "seed of controls, shuffles and the written text", at_least=0, at_most=2**31)


# ---------------------------------------------------------------------------------------------------------------------
# The analysis


def analysis_of(run, options, title):
    """The whole analysis, as in analyses.SCHEMA. title: of the progress bar."""
    started, config, model = time.perf_counter(), run.config, run.model
    snapshots = run_folder.snapshots_in(run.folder) if model.moe_layers() else []
    n_ablations = ablation.count(model) if options.ablation else 0
    passes = 4 + len(snapshots) + n_ablations
    bar = tqdm(total=passes, desc=title, unit="pass", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    with bar:
        bar.set_postfix_str("reading the text")
        seen = probe.see(model, run.windows, run.machine)
        bar.update()
        layers, paths = parts.measure_routing(run, seen)
        bar.update()
        passed = probe.see(model, run.pass_windows, run.machine)
        bar.set_postfix_str("following the routing over training")
        stability = parts.measure_stability(run, passed, snapshots, bar.update)
        bar.set_postfix_str("gradients")
        pulls, conflicts = parts.measure_gradients(run, options.gradient_batches)
        bar.update()
        bar.set_postfix_str("ablation")
        ablated = None
        if n_ablations:
            n, (classes_N, names) = len(passed.nats_N), run.classes
            ablated = ablation.ablations(
                model, run.pass_windows, run.machine, passed, run.ids_N[:n], (classes_N[:n], names),
                run.vocabulary, run.counts_V, run.seed, bar.update,
            )  # fmt: skip
        bar.set_postfix_str("writing")
        sample = parts.write_sample(run, options.sample_characters)
        bar.update()
    history = parts.read_load_history(run.folder, config)
    return {
        "format": analyses.FORMAT,
        "run_id": config.run_id,
        "title": config.title,
        "config": config.to_record(),
        "dataset": run.dataset.describe(),
        "leaky": not config.is_causal,
        **({} if run.is_straight is None else {"straight": run.is_straight}),
        "git": machines.git_state([path for path in machines.loaded_code() if not path.startswith(DRAWING)]),
        "machine": machines.describe(run.machine),
        "weights": {"checkpoint": run.checkpoint, "step": run.step},
        "text": {"characters": len(run.ids_N), "whole": run.is_whole},
        "asked": {
            name: getattr(options, name) for name in ("characters", "pass_characters", "gradient_batches", "seed")
        },
        "passes": len(passed.nats_N),
        "nats": seen.nats,
        "by_class": parts.losses_by_class(run, seen),
        "symbols": [name_of(symbol) for symbol in run.vocabulary.symbols],
        "layers": layers,
        "paths": paths,
        "ablation": ablated,
        "router_gradients": pulls,
        "conflicts": conflicts,
        "evolution": history,
        "collapsed": parts.find_collapses(history, config),
        "stability": stability,
        "sample": sample,
        "seconds": time.perf_counter() - started,
    }


# ---------------------------------------------------------------------------------------------------------------------
# The summary on the screen


def summary(analysis):
    """A short summary, in lines."""
    config, text = analysis["config"], analysis["text"]
    part = "the validation split" if text["whole"] else f"the first {text['characters']:,} characters of validation"
    lines = [
        f"\n{analysis['title'] or 'run'}: {analysis['dataset']['name']}, seed {config['seed']}, step "
        f"{analysis['weights']['step']:,}: {analysis['nats']:.4f} nats on {part}"
    ]
    if analysis["leaky"]:
        lines.append("  † the routing sees later characters, or other sequences: nothing here is of a language model")
    if not analysis["layers"]:
        lines.append(
            "  A dense model: it has no router and no experts. Measured: loss by class, gradients of its MLPs."
        )
    else:
        lines += [*summary_table(analysis), *paths_lines(analysis)]
    worst = sorted(analysis["by_class"].items(), key=lambda item: -item[1]["nats"])
    lines.append("  loss after a " + ", ".join(f"{name} {of['nats']:.2f}" for name, of in worst) + " nats")
    for found in analysis["collapsed"]:
        lines.append(f"  {analyses.collapse_text(found)}")
    if analysis["layers"] and not analysis["stability"]:
        lines.append("  No snapshots: train with --save_every=100 to see when routing settles.")
    return lines


def summary_table(analysis):
    """One line for each layer, with the columns that any layer has, and notes on them."""
    rows = [[text(analysis, i) for _, text in COLUMNS] for i in range(len(analysis["layers"]))]
    columns = [(heading, *cells) for (heading, _), *cells in zip(COLUMNS, *rows) if set(cells) != {NONE}]
    widths = [max(map(len, column)) for column in columns]
    lines = ["   ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in zip(*columns)]
    shown = {heading for heading, *_ in columns}
    topics = ", ".join(name for name in TOPIC if name in analysis["layers"][0]["about"])
    values = {"topics": topics, "step": analyses.early_step(analysis)}
    lines += [text.format_map(values) for heading, text in NOTES.items() if heading in shown]
    ablated = analysis["ablation"] or {}
    costs = [(text, ablated.get(name)) for name, text in COSTS.items()]
    costs = [f"{text} {cost['nats']:+.4f} ± {cost['se'] or 0:.4f}" for text, cost in costs if cost]
    if costs:
        lines.append(f"cost in nats (± standard error, {analysis['passes']:,} characters): {', '.join(costs)}.")
    return [f"  {line}" for line in lines]


def paths_lines(analysis):
    """The paths through all layers, beside those of random routers; none where only one path is possible."""
    possible = math.prod(layer["n_expert"] for layer in analysis["layers"])
    values = {name: (analyses.of_paths(name)(analysis), analyses.frozen_paths(name)(analysis)) for name in PATHS}
    told = [text.format(*values[name]) for name, text in PATHS.items() if None not in values[name]]
    lines = f"paths (random router): {', '.join(told[:2])}, of {possible:,} possible.", f"{', '.join(told[2:])}."
    return [f"  {line}" for line in lines] if possible > 1 else []


def percent(share):
    return NONE if share is None else f"{share:.1%}"


def early(analysis, i):
    step, found = analyses.early_step(analysis), analysis["stability"]
    if step is None:
        return NONE
    layer, place = found["layers"][i], found["steps"].index(step)
    return f"{layer['agreement'][place]:.0%} (chance {layer['chance'][place]:.0%})"


def router_pull(analysis, i):
    found = analysis["router_gradients"][i]
    if not found or found["cosine"] is None:
        return NONE
    interval = "" if found["low"] is None else f" [{found['low']:+.2f}, {found['high']:+.2f}]"  # None from one batch
    return f"{found['cosine']:+.2f}{interval}"


def removal(analysis, i):
    found = analysis["ablation"] and analysis["ablation"]["removed"][i]
    return NONE if not found else f"{min(of['nats'] for of in found):+.3f} to {max(of['nats'] for of in found):+.3f}"


NONE = "–"  # a layer has no such number
COLUMNS = (  # heading, (analysis, index of the layer) -> text
    ("block", lambda a, i: str(a["layers"][i]["block"])),
    ("load", lambda a, i: " ".join(f"{share:.0%}" for share in a["layers"][i]["load"]["load"])),
    ("effective", lambda a, i: f"{a['layers'][i]['load']['effective']:.2f} of {a['layers'][i]['n_expert']}"),
    ("character", lambda a, i: percent(a["layers"][i]["about"]["character"]["share"])),
    ("(frozen)", lambda a, i: percent(a["layers"][i]["frozen"]["about"]["character"]["mean"])),
    ("+ previous two", lambda a, i: percent(analyses.most_given_character(a["layers"][i], CONTEXT[1:2]))),
    ("+ topic", lambda a, i: percent(analyses.most_given_character(a["layers"][i], TOPIC))),
    ("early", early),
    ("router cosine", router_pull),
    ("an expert's removal", removal),
)  # fmt: skip
NOTES = {  # heading of a column: what it shows
    "character": "character: the share of H(expert) that the character tells; (frozen): for a random router.",
    "+ previous two": "+ previous two: what the two characters before it tell beyond that, less what chance gives.",
    "+ topic": "+ topic: the same for the topic of the text; the best of {topics}.",
    "early": "early: share of characters that have their final expert at step {step:,} already.",
    "router cosine": "router cosine: between the gradients of cross-entropy and of balance, with its 95% interval.",
}
PATHS = {  # name in analyses.OF_PATHS: text with the number, and that of a random router
    "used": "{:,} ({:,.0f}) in use",
    "effective": "effective {:,.1f} ({:,.1f})",
    "given_character": "H(path | character) {:.2f} ({:.2f}) nats",
    "character": "the path tells {:.0%} ({:.0%}) of the character",
    "between_layers": "two layers share {:.3f} ({:.3f}) nats",
}
COSTS = {  # parts of the ablation
    "shuffled_all": "all routing shuffled",
    "tabulated_all": "each character to its commonest expert",
    "removed_all": "each layer's cheapest expert removed",
    "merged_all": "the same expert merged with another",
}


# ---------------------------------------------------------------------------------------------------------------------


def write(folder, analysis, options):
    """Writes analysis.json and its figures. -> a line that names the files"""
    text = analyses.text_of(analysis)
    files.write_atomically(folder / "analysis.json", text.encode())
    drawings = figures_of_run.of_run(analysis)
    for name, drawing in drawings.items():
        files.write_atomically(folder / f"analysis_{name}.svg", style.svg(drawing.figure).encode())
    names = ", ".join(["analysis.json", *(f"analysis_{name}.svg" for name in drawings)])
    said = f"  wrote {names} in {os.path.relpath(folder)}"
    if options.results:
        kept = Path(options.results) / records.ANALYSIS / f"{folder.resolve().name}.json"
        with files.writing(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(kept, text.encode())
        said += f", and {os.path.relpath(kept)}"
    return f"{said} after {console.duration(analysis['seconds'])}"


def main(argv):
    folders = [word for word in argv if not word.startswith("-")]
    options = configurator.parse(
        Options,
        [word for word in argv if word.startswith("-")],
        usage="python analyze.py OUT_DIR… [--key=value …]",
        description=__doc__,
    )
    if not folders:
        raise ConfigError(["which run? expected python analyze.py OUT_DIR…, the folder that train.py named at its end"])
    machine = machines.choose(options.device, options.dtype, compile=False)
    problems = []
    for folder in map(files.expanded, folders):
        try:
            run = AnalysedRun(folder, options, machine)
            analysis = analysis_of(run, options, folder.name)
        except UserError as error:
            problems.append(error)
            if len(folders) > 1:
                print(f"left out: {error}", file=sys.stderr)
            continue
        print("\n".join(summary(analysis)))
        print(write(folder, analysis, options))
    if problems and len(folders) == 1:
        raise problems[0]
    return 1 if problems else 0


if __name__ == "__main__":
    console.run(main)
