"""What the router of a run has learned: load, specialisation, stability, gradients, ablations.

    python analyze.py out/shakespeare_moe4-cpu-s1337
    python analyze.py out/*-cpu-s*/ --results=results    keeps the analyses for plot_results.py, too
    python analyze.py out/… --ablation=False             all but the slowest part

Reads the run's last weights and the start of its validation split; writes analysis.json and
analysis_*.svg into the run's folder, and prints a short reading. Runs that were trained with
--save_every have their routing followed over training. A dense model has no router; its loss by
class and its gradients are measured, to hold experts against.

Exit codes: 0 done; 1 a folder of several could not be analysed, and was named; 2 a mistake in
what was asked.
"""

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import balance
from analysis import ablation, analyses, gradients, information, probe
from analysis.analyses import CONTEXT, SYNTAX, TOPIC
from analysis.annotation import annotate, class_of, name_of
from data.common import DataError, Dataset, find
from model import IGNORED
from report import figures, figures_of_run
from routing import hash_table, mix_seeds
from run import records, run_folder
from run.checkpoint import CheckpointError
from run.evaluate import drop_rate_by_class
from run.trained import CHECKPOINTS, load, model_in, read
from speed import decoding
from support import configurator, console, files, machines
from support.files import FileError
from support.options import ConfigError, option

# Batches of an analysis come from another stream than those of training and of evaluation with the same seed.
ANALYSIS_STREAM = 2**33
LOAD_BATCHES = 64  # in which the tokens of each expert are counted
DRAWS = 5  # of every control


@dataclass(frozen=True)
class Options:
    """What may follow the folders."""

    checkpoint: Literal["last", "best"] = option("last", "ckpt.pt, or best.pt (lowest validation loss)")
    characters: int = option(
        200_000, "of the validation split, from its start, in whole batches; 0 = all of it", at_least=0
    )
    pass_characters: int = option(
        16_000, "of these, for ablation and stability, which read them many times; 0 = all", at_least=0
    )
    ablation: bool = option(True, "what the loss becomes when experts or routing are altered")
    gradient_batches: int = option(8, "batches of the training text; 0 = no gradients", at_least=0, at_most=10_000)
    sample_characters: int = option(400, "of text written with its experts; 0 = none", at_least=0, at_most=100_000)
    results: str = option("", "also keep the analysis as analysis/RUN.json in this folder, for plot_results.py")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "precision of matrix products")
    seed: int = option(0, "of controls, shuffles and the text that is written", at_least=0, at_most=2**31)


class Bar:
    """One bar over all that is done with a run."""

    def __init__(self, title, total):
        self.bar = tqdm(total=total, desc=title, unit="pass", disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def doing(self, what):
        self.bar.set_postfix_str(what)

    def done(self):
        self.bar.update()


# ---------------------------------------------------------------------------------------------------------------------
# What is analysed


class Subject:
    """A run's weights, and the text that they are looked at on: windows of it, of which `passed` are the first, and
    ids_N, its N characters. about: what each of them is."""

    def __init__(self, folder, options, machine):
        name = CHECKPOINTS[options.checkpoint]
        self.folder, self.options, self.machine, self.checkpoint = folder, options, machine, name
        saved = read(folder, name)
        state = saved.get("progress", saved)  # ckpt.pt keeps its step there
        if "dataset" not in saved or "step" not in state:
            raise CheckpointError(f"{folder / name}: does not say its text and its step; is it of another program?")
        self.step = state["step"]
        self.model, self.vocabulary, self.config = model_in(saved, folder / name, machine.device)
        self.model.set_step(self.step)
        self.dataset = self.dataset_of(saved)
        windows = list(self.dataset.windows("val", self.config.block_size, self.config.batch_size))
        self.windows = self.first(windows, options.characters)
        self.passed = self.first(self.windows, options.pass_characters)
        self.is_whole = len(self.windows) == len(windows)
        self.ids_N = np.concatenate([x[y != IGNORED].cpu().numpy() for x, y in self.windows])
        self.counts_V = self.dataset.symbol_counts("train")
        self.about = annotate(self.ids_N, self.vocabulary, self.counts_V, self.config.block_size)

    @property
    def seed(self):
        """Of what is drawn for this run: runs of other seeds draw others."""
        return mix_seeds(self.options.seed, self.config.seed) % 2**31

    def first(self, windows, characters):
        """-> as many batches of windows as that many characters fill, at least one; 0: all."""
        count = characters // (self.config.batch_size * self.config.block_size)
        return windows[: max(1, count)] if characters else windows

    def dataset_of(self, saved):
        """The data set that the run was trained on. CheckpointError where the one of its name is another text."""
        config = self.config
        dataset = Dataset.open(find(config.dataset), self.machine.device).train_on_first(config.train_characters)
        if saved["dataset"] != dataset.describe() or saved["vocabulary"] != dataset.vocabulary.to_dict():
            differing = run_folder.texts(saved["dataset"], dataset.describe())
            raise CheckpointError(
                f"{self.folder} was trained on another text than {config.dataset} is now: {differing}"
            )
        return dataset

    def batches(self, count):
        """Batches as training draws them, but none of its own."""
        config = self.config
        return [
            self.dataset.batch("train", config.seed + ANALYSIS_STREAM, i, config.batch_size, config.block_size)
            for i in range(count)
        ]

    @property
    def classes(self):
        return self.about["class"].labels, self.about["class"].names


# ---------------------------------------------------------------------------------------------------------------------
# The parts of an analysis


def analysis_of(subject, bar_title):
    """All of it, as analyses.SCHEMA says."""
    started, config, options, model = time.perf_counter(), subject.config, subject.options, subject.model
    snapshots = run_folder.snapshots_in(subject.folder) if model.moe_layers() else []
    has_ablation = options.ablation and bool(model.moe_layers())
    bar = Bar(bar_title, 4 + len(snapshots) + (ablation.count(model) if has_ablation else 0))
    with bar.bar:
        bar.doing("reading the text")
        seen = probe.see(model, subject.windows, subject.machine)
        bar.done()
        layers = layers_of(subject, seen)
        bar.done()
        passed = probe.see(model, subject.passed, subject.machine)
        bar.doing("following the routing over training")
        stability = stability_of(subject, passed, snapshots, bar)
        bar.doing("gradients")
        pulls, conflicts = gradients_of(subject)
        bar.done()
        bar.doing("taking experts away")
        ablated = None
        if has_ablation:
            n, (classes_N, names) = len(passed.nats_N), subject.classes
            ablated = ablation.ablations(
                model, subject.passed, subject.machine, passed, subject.ids_N[:n], (classes_N[:n], names),
                subject.vocabulary, subject.counts_V, subject.seed, bar.done,
            )  # fmt: skip
        bar.doing("writing")
        sample = sample_of(subject)
        bar.done()
    evolution = evolution_of(subject.folder, config)
    return {
        "format": analyses.FORMAT,
        "run_id": config.run_id,
        "title": config.title,
        "config": config.to_dict(),
        "dataset": subject.dataset.describe(),
        "leaky": not config.is_causal,
        "git": machines.git_state(),
        "machine": machines.describe(subject.machine),
        "weights": {"checkpoint": subject.checkpoint, "step": subject.step},
        "text": {"characters": len(subject.ids_N), "whole": subject.is_whole},
        "asked": {
            name: getattr(options, name) for name in ("characters", "pass_characters", "gradient_batches", "seed")
        },
        "passes": len(passed.nats_N),
        "nats": seen.nats,
        "by_class": losses_by_class(subject, seen),
        "symbols": [name_of(symbol) for symbol in subject.vocabulary.symbols],
        "layers": layers,
        "ablation": ablated,
        "router_gradients": pulls,
        "conflicts": conflicts,
        "evolution": evolution,
        "collapsed": collapses(evolution, config),
        "stability": stability,
        "sample": sample,
        "seconds": time.perf_counter() - started,
    }


def losses_by_class(subject, seen):
    """{class of a character: how many, and the mean loss of what follows them}"""
    labels_N, names = subject.classes
    return {
        name: {"characters": int((labels_N == i).sum()), "nats": float(seen.nats_N[labels_N == i].mean())}
        for i, name in enumerate(names)
        if (labels_N == i).any()
    }


def layers_of(subject, seen):
    """Load and specialisation of each MoE layer."""
    model, config, layers = subject.model, subject.config, []
    frozen = probe.random_routers(model, subject.windows, subject.machine, DRAWS, subject.seed)
    per_batch = tokens_per_batch(subject)
    for number, (block, layer) in enumerate(zip(config.moe_layers, model.moe_layers())):
        n_expert = layer.config.n_expert
        chosen_N, character_N = seen.first[number], subject.about["character"].labels
        seeds = [mix_seeds(subject.seed, block, draw) for draw in range(DRAWS)]
        tables = [hash_table(subject.counts_V, n_expert, seed).numpy()[subject.ids_N] for seed in seeds]
        load = balance.summarize(seen.stats[number], in_detail=True)
        load |= drop_rate_by_class(seen.stats[number], subject.vocabulary)
        load |= {"effective": float(information.effective_number(np.array(load["load"])))}
        layers.append(
            {
                "block": block,
                "n_expert": n_expert,
                "k": 1 if config.router_top_p else layer.config.expert_top_k or n_expert,
                "load": load,
                "tokens_per_batch": per_batch[number],
                "counts": counts_of(subject.ids_N, chosen_N, subject.vocabulary.size, n_expert),
                "entropy": information.entropy(chosen_N),
                "entropy_given_character": information.conditional_entropy(chosen_N, character_N),
                "about": measured_about(subject, chosen_N),
                "about_given_character": measured_about(subject, chosen_N, given_N=character_N),
                "frozen": {
                    "about": drawn(subject, frozen[number]),
                    "about_given_character": drawn(subject, frozen[number], given_N=character_N),
                },
                "hash": drawn(subject, tables),
                "by_class": by_class(subject, chosen_N, n_expert),
            }
        )
    return layers


def counts_of(ids_N, labels_N, n_symbols, n_expert):
    """How often each symbol (row) has each expert for its router's first choice."""
    return np.bincount(ids_N * n_expert + labels_N, minlength=n_symbols * n_expert).reshape(n_symbols, -1).tolist()


def null_of(name):
    """The control that an annotation needs: see information.measured. Routing by the whole sequence keeps its expert
    for a window of block_size."""
    if name in ("speaker", "article"):
        return information.SHIFTED
    return information.BLOCKS if name in TOPIC else information.SHUFFLED


def asked_of(subject, given_N):
    """The annotations that are held against experts: those of the character itself only where it is not given."""
    own = ("character", "class", "frequency band") if given_N is None else ()
    names = (*own, *SYNTAX[1:], *CONTEXT, *TOPIC)
    return [name for name in names if name in subject.about]


def measured_about(subject, labels_N, given_N=None, draws=DRAWS):
    """{annotation: information.measured}"""
    seed, size = subject.seed, subject.config.block_size
    return {
        name: information.measured(
            labels_N, subject.about[name].labels, given_N, draws, seed, null_of(name), size
        )._asdict()
        for name in asked_of(subject, given_N)
    }


def drawn(subject, routers, given_N=None):
    """{annotation: the share of H(expert) that it tells of each of these routers, (N,) each, less what chance gives:
    mean and SD}"""
    shares = {name: [] for name in asked_of(subject, given_N)}
    for labels_N in routers:
        layer = {"entropy": information.entropy(labels_N)}
        for name, found in measured_about(subject, labels_N, given_N, draws=2).items():
            shares[name].append(analyses.net(found, layer) or 0.0)
    return {
        name: {"mean": float(np.mean(of)), "sd": float(np.std(of, ddof=1)), "draws": len(of)}
        for name, of in shares.items()
    }


def by_class(subject, labels_N, n_expert):
    """{class: how many, the entropy of their experts, their load}"""
    classes_N, names = subject.classes
    found = {}
    for i, name in enumerate(names):
        of_class = labels_N[classes_N == i]
        if len(of_class):
            load = np.bincount(of_class, minlength=n_expert) / len(of_class)
            entropy = information.entropy(of_class)
            found[name] = {"characters": len(of_class), "entropy": entropy, "load": load.tolist()}
    return found


@torch.no_grad()
def tokens_per_batch(subject):
    """Per MoE layer: how many of a training batch's tokens each expert gets, before capacity. D's "per-expert batch
    size"."""
    config, loads = subject.config, []
    for x, y in subject.batches(LOAD_BATCHES):
        with subject.machine.autocast():
            loads.append([layer.load.cpu().numpy() for layer in subject.model(x, y).stats])
    found = []
    for of_layer in zip(*loads):
        loads_BE = np.stack(of_layer)
        found.append(
            {
                "batches": len(loads_BE),
                "characters": config.batch_size * config.block_size,
                "mean": loads_BE.mean(axis=0).tolist(),
                "sd": loads_BE.std(axis=0, ddof=1).tolist(),
                "none": float((loads_BE == 0).mean()),
            }
        )
    return found


def gradients_of(subject):
    """(gradients.router_gradients, gradients.conflicts)"""
    count, model = subject.options.gradient_batches, subject.model
    if not count:
        return [None] * len(model.moe_layers()), []
    batches = subject.batches(count)
    pulls = gradients.router_gradients(model, batches, subject.machine, seed=subject.seed)
    classes_V, names = class_of(subject.vocabulary)
    return pulls, gradients.conflicts(model, batches, subject.machine, classes_V, names, seed=subject.seed)


def stability_of(subject, passed, snapshots, bar):
    """How the routing of the snapshots compares with that of the weights at hand; None without snapshots. passed: what
    probe.see saw of subject.passed."""
    if not snapshots:
        return None
    n = len(passed.nats_N)
    character_N, band_N = (subject.about[name].labels[:n] for name in ("character", "frequency band"))
    layers = [
        {name: [] for name in ("agreement", "chance", "churn", "character", "frequency band")} for _ in passed.first
    ]
    steps, before = [], None
    for step, path in snapshots:
        model, _, config = load(subject.folder, path.relative_to(subject.folder), subject.machine.device)
        if config.run_id != subject.config.run_id:
            raise CheckpointError(f"{path} is of another experiment than {subject.checkpoint}")
        model.set_step(step)
        now = probe.see(model, subject.passed, subject.machine).first
        for i, layer in enumerate(layers):
            total = information.entropy(now[i])
            layer["agreement"].append(information.agreement(now[i], passed.first[i]))
            layer["chance"].append(information.chance_agreement(now[i], passed.first[i]))
            changed = None if before is None else 1 - information.agreement(now[i], before[i])
            layer["churn"].append(None if before is None else changed / (step - steps[-1]))
            for name, labels_N in (("character", character_N), ("frequency band", band_N)):
                layer[name].append(information.information(now[i], labels_N) / total if total else 0.0)
        steps.append(step)
        before = now
        bar.done()
    return {"steps": steps, "layers": layers}


def evolution_of(folder, config):
    """The load of every evaluation, from metrics.jsonl; None where that is not there."""
    found = {}
    try:
        text = files.read_whole(folder / "metrics.jsonl", files.LARGEST_JSON).decode()
    except (OSError, ValueError):
        return None
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            if values["kind"] == "eval" and len(values["load"]) == len(config.moe_layers):
                found[values["step"]] = values["load"]
    return {"steps": list(found), "loads": list(found.values())} if found and config.n_expert else None


def collapses(evolution, config):
    """[{"block", "step", "until"}]: from which evaluation after the first update on a router had collapsed, and at
    which one it no longer had; None where that is how it ended."""
    found, since = [], {}
    for step, loads in zip(evolution["steps"], evolution["loads"]) if evolution else ():
        now = set(records.collapsed_blocks(config, loads)) if step else set()
        found += [{"block": block, "step": since.pop(block), "until": step} for block in set(since) - now]
        since |= {block: step for block in now - set(since)}
    found += [{"block": block, "step": step, "until": None} for block, step in since.items()]
    return sorted(found, key=lambda one: (one["block"], one["step"]))


def sample_of(subject):
    """Text that the model writes, and each character's expert in every MoE layer; None where it cannot write."""
    model, config, count = subject.model, subject.config, subject.options.sample_characters
    if not count or not config.is_causal or not model.moe_layers():
        return None
    newline = next((i for i, symbol in enumerate(subject.vocabulary.symbols) if symbol in ("\n", 10)), 0)
    decoder = decoding.fastest(model, 1, subject.machine, 0.8, 200)
    generator = torch.Generator().manual_seed(subject.seed)
    layers = range(len(model.moe_layers()))
    unread, tokens, experts = [newline], [], [[] for _ in layers]
    for step in decoder.write(torch.tensor([unread], device=subject.machine.device), count + 1, [generator]):
        for layer in layers:  # of what was read since: the last token, or half a window again
            experts[layer].append(int(step.experts(layer)[0, -1]))
        tokens += unread
        unread = step.tokens.tolist()
    decode, text, of_text = subject.vocabulary.decoder(), "", [[] for _ in layers]
    for i, token in enumerate(tokens):
        piece = decode([token])
        text += piece
        for layer in layers:
            expert = experts[layer][i]
            of_text[layer] += [None if expert < 0 else expert] * len(piece)
    return {"text": text, "experts": of_text}


# ---------------------------------------------------------------------------------------------------------------------
# In words


def reading(analysis):
    """A short reading, in lines."""
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
        lines += table_of(analysis)
    worst = sorted(analysis["by_class"].items(), key=lambda item: -item[1]["nats"])
    lines.append("  loss after a " + ", ".join(f"{name} {of['nats']:.2f}" for name, of in worst) + " nats")
    for found in analysis["collapsed"]:
        lines.append(f"  {analyses.collapse_text(found)}")
    if analysis["layers"] and not analysis["stability"]:
        lines.append("  No snapshots: train with --save_every=100 to see when routing settles.")
    return lines


def table_of(analysis):
    rows = [[heading for heading, _ in COLUMNS]]
    rows += [[text(analysis, i) for _, text in COLUMNS] for i in range(len(analysis["layers"]))]
    keep = [i for i in range(len(COLUMNS)) if any(row[i] != "–" for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in keep]
    lines = ["  " + "   ".join(row[i].rjust(width) for i, width in zip(keep, widths)) for row in rows]
    notes = [
        "  character: the share of H(expert) that the character tells; frozen: of a random router on the same inputs;",
        "  + previous two, + topic: what these tell beyond it, less what chance gives (topic: the best of "
        f"{', '.join(name for name in TOPIC if name in analysis['layers'][0]['about'])}).",
    ]
    step, costs = analyses.early_step(analysis), analysis["ablation"]
    if step is not None:
        notes.append(f"  early: characters that have their last expert already at step {step:,}.")
    if any(analysis["router_gradients"]):
        notes.append("  router cosine: of the gradients of cross-entropy and of balance, with its 95% interval.")
    if costs:
        told = {
            "all routing shuffled": costs["shuffled_all"],
            "each character to its commonest expert": costs["tabulated_all"],
            "each layer's cheapest expert removed": costs["removed_all"],
            "merged": costs["merged_all"],
        }
        parts = [f"{name} {of['nats']:+.4f} ± {of['se'] or 0:.4f}" for name, of in told.items() if of]
        notes.append(f"  nats that it costs (± standard error, {analysis['passes']:,} characters): {', '.join(parts)}.")
    return [*lines, *notes]


def percent(share):
    return "–" if share is None else f"{share:.1%}"


def early(analysis, i):
    step, found = analyses.early_step(analysis), analysis["stability"]
    if step is None:
        return "–"
    layer, place = found["layers"][i], found["steps"].index(step)
    return f"{layer['agreement'][place]:.0%} (chance {layer['chance'][place]:.0%})"


def router_pull(analysis, i):
    found = analysis["router_gradients"][i]
    return (
        f"{found['cosine']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"
        if found and found["cosine"] is not None
        else "–"
    )


def removal(analysis, i):
    found = analysis["ablation"] and analysis["ablation"]["removed"][i]
    return "–" if not found else f"{min(of['nats'] for of in found):+.3f} to {max(of['nats'] for of in found):+.3f}"


COLUMNS = (  # heading, of (analysis, number of the layer), as text
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


# ---------------------------------------------------------------------------------------------------------------------


def write(folder, analysis, options):
    """analysis.json and its figures into the run's folder, and where options.results says. -> a line that says so"""
    text = analyses.text_of(analysis)
    files.write_atomically(folder / "analysis.json", text.encode())
    drawings = figures_of_run.of_run(analysis)
    for name, drawing in drawings.items():
        files.write_atomically(folder / f"analysis_{name}.svg", figures.svg(drawing.figure).encode())
    said = f"  wrote {os.path.relpath(folder)}/analysis.json and analysis_{{{','.join(drawings)}}}.svg"
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
    for folder in map(Path, folders):
        try:
            subject = Subject(folder, options, machine)
            analysis = analysis_of(subject, folder.name)
        except (ConfigError, DataError, FileError) as error:
            problems.append(error)
            if len(folders) > 1:
                print(f"left out: {error}", file=sys.stderr)
            continue
        print("\n".join(reading(analysis)))
        print(write(folder, analysis, options))
    if problems and len(folders) == 1:
        raise problems[0]
    return 1 if problems else 0


if __name__ == "__main__":
    console.run(main, (ConfigError, DataError, FileError))
