"""Train a character-level GPT, dense or Mixture of Experts.

    python train.py config/shakespeare_moe4.py                  at the papers' size, on a GPU
    python train.py config/shakespeare_moe4.py config/cpu.py    the same at CPU size
    python train.py config/shakespeare_dense.py --n_layer=4 --seed=2
    torchrun --nproc_per_node=4 train.py config/shakespeare_moe4.py    by four processes, a GPU each
    python train.py --help                                      every key

A run lives in its out_dir: config.json, metrics.jsonl (a line a log or evaluation), ckpt.pt (the last state), best.pt
(the best weights on the clean measure), and summary.json once it is complete. Ctrl-C saves; the same command with
--init_from=resume goes on (--init_from=auto: where there is something to go on with). Exit codes: 0 done, 2 a mistake
in what was asked, 3 loss or gradient not finite, 4 another process of the run ended, 128 + n stopped by signal n (130
SIGINT, 143 SIGTERM, 138 SIGUSR1, 129 SIGHUP).
"""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time

import torch
from tqdm import tqdm

import balance
from data.common import DataError, Dataset, find, is_prepared
from model import GPT
from routing import mix_seeds
from run import accounting, evaluate, records, screen_report
from run.checkpoint import CheckpointError
from run.processes import Ranks, is_loss_of_another
from run.run_folder import RunFolder, check_resumable, difference
from run.settings import Config
from run.update import Sums, Updater, compile_model, random_state, set_random_state, undone
from support import configurator, console, files, machines
from support.files import FileError
from support.options import ConfigError

SLOW_SECONDS = 900  # a run that would take longer than this on a CPU is told so, and of config/cpu.py
SECONDS_BETWEEN_LINES = 30  # of progress, where the output is not a terminal
SAVE = 1  # see Training.wish


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop


def prepare(config):
    """Make the data set's bins where they are missing and config.prepare allows it."""
    folder = find(config.dataset)
    script = folder / "prepare.py"
    # Only a script of ours is run unasked; bins that are there without a meta.json are somebody's, and are told about.
    is_ours = folder.parent == machines.ROOT / "data" and script.exists()
    if not is_ours or is_prepared(folder):
        return
    shown = os.path.relpath(script)
    if not config.prepare:
        raise DataError(f"{config.dataset} is not prepared, and --prepare=False forbids to do it now: python {shown}")
    print(f"{config.dataset} is not prepared yet: running python {shown}", flush=True)
    if subprocess.run([sys.executable, str(script)]).returncode != 0:
        raise DataError(f"{config.dataset} could not be prepared (the reason is above)")


def open_dataset(config, device):
    """The prepared data set, long enough for a block."""
    dataset = Dataset.open(find(config.dataset), device).train_on_first(config.train_characters)
    for split in ("train", "val"):
        if dataset.sizes.get(split, 0) <= config.block_size:
            raise DataError(
                f"the {split} split of {dataset.name} has {dataset.sizes.get(split, 0):,} characters: "
                f"too few for block_size={config.block_size}"
            )
    return dataset


def seconds_needed(model, batches, dataset, config, machine, ranks, steps):
    """A rough forecast of `steps` updates and their evaluations. batches: this process's micro-batches of an update,
    each (x, y), of which the first is run twice and undone (the first time warms up)."""
    x, y = batches[0]
    with undone(model):
        for _ in range(2):
            started = time.perf_counter()
            with machine.autocast():
                objective = model.train()(x, y).objective
            objective.backward()
            seconds = time.perf_counter() - started
    windows = dataset.sizes["val"] / (config.batch_size * config.block_size)
    forwards = (2 * config.eval_iters + windows) * (steps // config.eval_interval + 1) / ranks.count
    return seconds * (steps * len(batches) + forwards / 3)  # a forward pass takes a third of one with its backward


# ---------------------------------------------------------------------------------------------------------------------
# In the loop


class Interval(Sums):
    """What is summed between two log lines, read once, when the line is written. Its clock starts with it."""

    def __init__(self):
        super().__init__()
        self.started = time.perf_counter()

    @classmethod
    def from_state(cls, state, device):
        interval = cls()
        interval.steps, interval.started = state["steps"], interval.started - state["seconds"]
        interval.terms = {name: value.to(device) for name, value in state["sums"].items()}
        interval.stats = [balance.RoutingStats(*(value.to(device) for value in layer)) for layer in state["stats"]]
        return interval

    def add_states(self, others):
        """others: the states of processes that have ended."""
        for state in others:
            theirs = Interval.from_state(state, "cpu").tensors()
            for value, other in zip(self.tensors(), theirs, strict=True):
                value += other.to(value.device)

    def state(self):
        return {
            "steps": self.steps,
            "seconds": time.perf_counter() - self.started,
            "sums": self.terms,
            "stats": [list(layer) for layer in self.stats],
        }

    def pause(self, seconds):
        """What took so long just now was no training."""
        self.started += seconds

    def line(self, step, made, tokens_per_step, ranks):
        """The interval's line of metrics.jsonl: means over its steps and over the processes, in train mode. made: the
        Update of its last step, None where an earlier session made it."""
        terms, stats = self.totals(ranks)
        means = {name: value.item() / self.steps for name, value in terms.items()}
        seconds = time.perf_counter() - self.started  # the .item() above waited for the device
        return {
            "kind": "train",
            "step": step,
            **means,
            "learning_rate": made.learning_rate if made else None,
            "gradient_norm": made.gradient_norm.item() if made else None,
            "step_ms": 1000 * seconds / self.steps,
            "tokens_per_second": tokens_per_step * self.steps / seconds,
            "routing": [balance.summarize(layer) for layer in stats],
        }


class Screen:
    """A bar on a terminal; elsewhere a line now and then; nothing at all of a process that is_silent."""

    def __init__(self, config, start, is_silent):
        self.bar = tqdm(
            total=config.max_iters,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=is_silent or not sys.stderr.isatty(),
            file=console.Lasting(sys.stderr),
        )
        self.is_silent = is_silent
        self.last_line = time.monotonic()

    def log(self, step, line):
        loss, speed = line["loss"], line["tokens_per_second"]
        numbers = f"loss {loss:.3f} nats, {evaluate.bits(loss):.3f} bpc, {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(numbers, refresh=False)
        if self.bar.disable and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            remaining = (self.bar.total - step) * line["step_ms"] / 1000
            self.say(f"step {step:,} of {self.bar.total:,}: {numbers}, {console.duration(remaining)} left")

    def say(self, text):
        self.last_line = time.monotonic()
        if not self.is_silent:
            self.bar.clear()
            print(text, flush=True)


def evaluation_text(line, config, is_best=False):
    nats, bpc, train = line["clean"]["nats"], line["clean"]["bpc"], line["paper"]["train"]
    best = " (best so far)" if is_best else ""
    found = f"validation {nats:.4f} nats, {bpc:.4f} bpc{best}; {config.eval_iters} batches of train {train:.4f} nats"
    return f"step {line['step']:,} of {config.max_iters:,}: {found}"


def evaluation_line(model, dataset, config, machine, ranks, step):
    clean = evaluate.clean(model, dataset, "val", config, machine, ranks)
    train, val = (evaluate.paper(model, dataset, split, config, machine, step, ranks) for split in ("train", "val"))
    loads = [balance.summarize(layer)["load"] for layer in clean.stats or []]
    return {
        "kind": "eval",
        "step": step,
        "clean": {"nats": clean.nats, "bpc": clean.bpc},
        "paper": {"train": train.nats, "val": val.nats, "train_with_aux": train.with_aux, "val_with_aux": val.with_aux},
        "load": loads,
        "collapsed": records.collapsed_blocks(config, loads),
        "routing": [
            balance.summarize(layer, in_detail=True) | evaluate.drop_rate_by_class(layer, dataset.vocabulary)
            for layer in clean.stats or []
        ],
    }


def train_mode(lines):
    """What training itself saw, dropout and all: means over the steps since the last evaluation; None before any."""
    steps = sum(line[0] for line in lines)
    if not steps:
        return None
    loss, objective = (sum(line[0] * line[i] for line in lines) / steps for i in (1, 2))
    return {"loss": loss, "objective": objective}


def start_wandb(config):
    """A function that logs one line of metrics to Weights & Biases, or None."""
    if not config.wandb_log:
        return None
    try:
        import wandb

        wandb.init(project=config.wandb_project, name=config.wandb_run_name or config.title, config=config.to_dict())
    except ImportError:
        print("wandb_log=True, but wandb is not installed (pip install wandb): metrics go to metrics.jsonl only")
        return None
    except Exception as error:  # not logged in, no network, …: a tracker must not stop what it tracks
        print(f"wandb_log=True, but wandb says: {files.first_line(error)}; metrics go to metrics.jsonl only")
        return None
    is_well = True

    def log(line):
        nonlocal is_well
        numbers = {f"{line['kind']}/{key}": value for key, value in flat(line).items() if key != "kind"}
        try:
            if is_well:
                wandb.log(numbers, step=line["step"])
        except Exception as error:
            is_well = False
            print(f"wandb says: {files.first_line(error)}; from here on metrics go to metrics.jsonl only")

    return log


def flat(line):
    """{"clean": {"nats": 1.5}} -> {"clean/nats": 1.5}; lists are left out."""
    numbers = {}
    for key, value in line.items():
        if isinstance(value, dict):
            numbers |= {f"{key}/{name}": inner for name, inner in value.items()}
        elif not isinstance(value, list):
            numbers[key] = value
    return numbers


class Training:
    """A run from its first update, or from the one that it goes on with, to its record.

    saved: the checkpoint that it goes on from, or None. The processes of a run do all of this alike, each with its own
    part of the batches; `folder` and `screen` are the first one's.
    """

    def __init__(self, config, ranks, machine, dataset, saved):
        self.config, self.ranks, self.machine, self.dataset = config, ranks, machine, dataset
        torch.manual_seed(config.seed)
        self.model = GPT(config, dataset.vocabulary.size, dataset.symbol_counts("train")).to(machine.device)
        self.updater = Updater(self.model, config, machine, ranks)
        self.interval, self.best = Interval(), None
        self.progress = {
            "step": 0,
            "evaluations": [],
            "step_ms": [],
            "train_mode": [],  # steps, loss and objective of the log lines since the last evaluation
            "others": None,
            "git": machines.git_state(),
            "resumed": 0,
            "metrics_bytes": 0,
            "seconds": {"train": 0.0, "eval": 0.0, "save": 0.0, "compile": 0.0, "total": 0.0},
        }
        if not ranks.is_first:  # the same weights, but dropout and noise of its own
            torch.manual_seed(mix_seeds(config.seed, ranks.number))
        self.random = None
        if saved:
            self.restore(saved)
        self.rows = config.batch_size * config.gradient_accumulation_steps
        self.tokens_per_step = self.rows * config.block_size
        self.started = time.perf_counter() - self.progress["seconds"]["total"]
        self.neighbours = machines.Neighbours(machine, self.progress["others"])
        self.last_save = time.monotonic()

    # -----------------------------------------------------------------------------------------------------------------
    # State

    def restore(self, saved):
        """Be where the checkpoint was."""
        try:
            self.model.load_state_dict(saved["model"])
            self.updater.optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint does not fit its own config: {files.first_line(error)}") from error
        git, before = self.progress["git"], saved["progress"]["git"]
        is_clean = before["dirty"] is False and git["dirty"] is False
        is_clean = is_clean and machines.same_code(before["commit"], git["commit"])
        self.progress = {**saved["progress"], "resumed": saved["progress"]["resumed"] + 1}
        self.progress["git"] = {"commit": git["commit"], "dirty": not is_clean}  # no one commit may have made it all
        self.best = saved["best"]
        processes, number = saved["processes"], self.ranks.number
        if len(processes) == self.ranks.count:
            self.interval = Interval.from_state(processes[number]["interval"], self.machine.device)
            self.random = processes[number]["random"]
            return
        # Other processes than before: the first has all that they had summed up, the rest begin with nothing.
        self.interval = Interval.from_state(processes[0]["interval"], self.machine.device)
        if self.ranks.is_first:
            self.interval.add_states(process["interval"] for process in processes[1:])
            self.random = processes[0]["random"]
        else:
            for value in self.interval.tensors():
                value.zero_()
            torch.manual_seed(mix_seeds(self.config.seed, number, self.progress["step"]))

    def about(self):
        """What weights are of."""
        return {
            "config": self.config.to_dict(),
            "dataset": self.dataset.describe(),
            "vocabulary": self.dataset.vocabulary.to_dict(),
        }

    def state(self):
        """What a checkpoint holds. All processes ask for it together."""
        return {
            **self.about(),
            "model": self.model.state_dict(),
            "optimizer": self.updater.optimizer.state_dict(),
            "best": self.best,  # {"step", "model"}: the weights that were best on the clean measure
            "progress": self.progress,
            "processes": self.ranks.gathered({"interval": self.interval.state(), "random": random_state()}),
        }

    def save(self, is_best=False):
        started = time.perf_counter()
        seconds = self.progress["seconds"]
        seconds["total"] = started - self.started
        self.progress["others"] = self.neighbours.so_far()
        state = self.state()
        if self.ranks.is_first:
            self.progress["metrics_bytes"] = self.metrics.sync()
            self.folder.save(state, is_best)
        self.last_save = time.monotonic()
        self.spend_on_saving(time.perf_counter() - started)

    def save_snapshot(self):
        """Keep the weights as they are now, for analyze.py."""
        started = time.perf_counter()
        if self.ranks.is_first:
            weights = {"step": self.progress["step"], "model": self.model.state_dict()}
            self.folder.save_snapshot(self.about(), weights)
        self.spend_on_saving(time.perf_counter() - started)

    def spend_on_saving(self, seconds):
        self.progress["seconds"]["save"] += seconds
        self.interval.pause(seconds)

    # -----------------------------------------------------------------------------------------------------------------
    # Before the loop

    def batches(self, step):
        """This process's micro-batches of update number `step`: each x, y (B, T). They depend on the seed and the step
        alone."""
        x, y = self.dataset.batch("train", self.config.seed, step, self.rows, self.config.block_size)
        return list(zip(self.ranks.own(x, self.config), self.ranks.own(y, self.config)))

    def compile(self):
        if not self.machine.compile:
            return
        config = self.config
        evaluated = self.dataset.batch("train", config.seed, 0, config.batch_size, config.block_size)
        compiled = compile_model(self.model, *self.batches(0)[0], self.machine, evaluated)
        if compiled.failure:
            print(f"torch.compile failed, so this run is not compiled: {compiled.failure}")
        self.updater.run_model = compiled.model
        self.progress["seconds"]["compile"] += compiled.seconds
        self.machine = self.machine._replace(compile=not compiled.failure)

    def note_machine(self):
        """Keep in mind where the run is made; times of a run that was made in two places do not count."""
        here = {**machines.describe(self.machine), "processes": self.ranks.count}
        there = self.progress.get("machine", here if not self.progress["resumed"] else None)
        if there != here:
            self.neighbours.before = machines.UNKNOWN
            print(f"resumed on another machine ({difference(there, here)}): its times will not count")
        self.progress["machine"] = here

    def forecast(self, argv):
        """On a CPU, say how long a long run will take, and what would be shorter."""
        config, step = self.config, self.progress["step"]
        if self.machine.device.type != "cpu":
            return
        steps = config.max_iters - step
        seconds = seconds_needed(self.model, self.batches(0), self.dataset, config, self.machine, self.ranks, steps)
        if seconds <= SLOW_SECONDS:
            return
        print(f"At the speed of its first steps, this run needs about {console.duration(seconds)} on this machine.")
        overlay = os.path.relpath(machines.ROOT / "config" / "cpu.py")
        if overlay not in argv:
            words = [word for word in argv if not word.startswith("--out_dir")]
            print(f"The size made for a CPU: {shlex.join(['python', os.path.relpath(__file__), *words, overlay])}")

    def evaluation_line(self):
        """The line of metrics.jsonl that evaluates the model as it stands."""
        model, step = self.updater.run_model, self.progress["step"]
        return evaluation_line(model, self.dataset, self.config, self.machine, self.ranks, step)

    # -----------------------------------------------------------------------------------------------------------------
    # The loop

    def run(self, folder, metrics, argv):
        """-> the exit code. folder, metrics: a RunFolder and its Metrics; None but in the first process."""
        self.folder, self.metrics = folder, metrics
        config, progress, updater = self.config, self.progress, self.updater
        self.screen = Screen(config, progress["step"], is_silent=not self.ranks.is_first)
        if self.random:
            set_random_state(self.random)
        with console.StopSignals() as signals, self.screen.bar:
            while True:
                step = progress["step"]  # updates made so far
                self.model.set_step(step)
                wish = self.ranks.largest(self.wish(signals))
                evaluated = progress["evaluations"][-1]["step"] if progress["evaluations"] else -1
                is_due = step % config.eval_interval == 0 or step >= config.max_iters
                if is_due and evaluated < step and wish <= SAVE:
                    code = self.evaluate(signals)
                    if code is not None:
                        return code
                    continue
                if wish and self.went_bad():
                    return console.NOT_FINITE
                if wish > SAVE:
                    return self.stop(wish - SAVE, argv)
                if wish == SAVE:
                    self.save()
                if config.save_every and (step % config.save_every == 0 or step >= config.max_iters):
                    self.save_snapshot()
                if step >= config.max_iters:
                    break

                made = updater.update(
                    step,
                    *self.dataset.batch("train", config.seed, step, self.rows, config.block_size),
                    self.interval,
                )
                progress["step"] = step = step + 1
                self.screen.bar.update()

                # Once in a while: read what the device has summed up, and look whether it went well.
                if step % config.log_interval == 0 or step % config.eval_interval == 0 or step == config.max_iters:
                    if self.went_bad():
                        return console.NOT_FINITE
                    self.log(made)
            return self.finish(signals, argv)

    def wish(self, signals):
        """What this process would do before the next update: 0 nothing, SAVE, or SAVE + the signal to stop for."""
        if signals.caught:
            return SAVE + signals.caught[0]
        minutes = (time.monotonic() - self.last_save) / 60
        return SAVE if self.ranks.is_first and 0 < self.config.save_minutes < minutes else 0

    def log(self, made):
        line = self.interval.line(self.progress["step"], made, self.tokens_per_step, self.ranks)
        steps = self.interval.steps
        self.progress["seconds"]["train"] += line["step_ms"] * steps / 1000
        self.progress["step_ms"].append(line["step_ms"])
        self.progress["train_mode"].append([steps, line["loss"], line["objective"]])
        self.write(line)
        self.screen.log(self.progress["step"], line)
        self.interval = Interval()

    def write(self, line):
        if self.metrics:
            self.metrics.write(line)

    def evaluate(self, signals):
        """Evaluate, write and save. -> an exit code where that ends the run, None otherwise"""
        progress, step = self.progress, self.progress["step"]
        if self.interval.steps:  # resumed between two log lines, to be evaluated sooner than planned then
            self.log(None)
        if self.ranks.count > 1:  # an evaluation that they share cannot be stopped, and a launcher may not wait for it
            self.save()
        self.screen.bar.set_postfix_str("evaluating")
        started = time.perf_counter()
        line = signals.unless_stopped(self.evaluation_line, at_once=self.ranks.count == 1)
        if line is None:
            return None  # made again when the run goes on
        progress["seconds"]["eval"] += time.perf_counter() - started
        line |= {"train_mode": train_mode(progress["train_mode"]), "train_seconds": progress["seconds"]["train"]}
        progress["train_mode"] = []
        if not math.isfinite(line["clean"]["nats"]):
            return self.stop_not_finite(f"the validation loss at step {step:,}")
        is_best = all(line["clean"]["nats"] < past["clean"]["nats"] for past in progress["evaluations"])
        if is_best:
            weights = self.model.state_dict()
            self.best = {"step": step, "model": {name: value.to("cpu", copy=True) for name, value in weights.items()}}
        for past in progress["evaluations"]:
            past.pop("routing", None)  # metrics.jsonl has it
        progress["evaluations"].append(line)
        self.write(line)
        self.interval = Interval()
        self.save(is_best)
        self.screen.say(evaluation_text(line, self.config, is_best))
        self.warn_of_collapse(line)
        return None

    def warn_of_collapse(self, line):
        """A line of warning for each layer that has collapsed since the evaluation before. Untrained ones do not
        count."""
        before = [past for past in self.progress["evaluations"][:-1] if past["step"]]
        known = before[-1].get("collapsed", ()) if before else ()
        for block in line["collapsed"] if line["step"] else ():
            if block not in known:
                load = line["load"][self.config.moe_layers.index(block)]
                self.screen.say(
                    f"warning: the router of block {block} has collapsed: of its {len(load)} experts, one gets "
                    f"{max(load):.0%} of the choices, the least {min(load):.1%}"
                )

    def stop(self, number, argv):
        """Save, and say how to go on. -> the exit code"""
        self.save()
        self.ranks.wait()  # a launcher may end all when the first of them has ended
        name = signal.Signals(number).name
        self.screen.say(f"\nstopped by {name} after step {self.progress['step']:,}; saved. To go on:")
        self.screen.say(f"  {resume_command(argv, self.ranks)}")
        return 128 + number

    def went_bad(self):
        """Whether the guard has refused an update since it was last asked; says so. Waits for the device."""
        bad_step = self.updater.guard.first_bad_step()
        if bad_step is not None:
            self.stop_not_finite(f"the loss or a gradient of step {bad_step:,}")
        return bad_step is not None

    def stop_not_finite(self, what):
        if self.ranks.is_first:
            kept = self.folder / "ckpt.pt"
            print(
                f"{what} is not finite: stopped before that update. "
                + (f"The last good checkpoint is {kept}." if kept.exists() else "There is no checkpoint yet.")
                + " A lower learning_rate, a longer warmup_iters or a z_loss_coef of 1e-3 may help.",
                file=sys.stderr,
            )
        return console.NOT_FINITE

    def finish(self, signals, argv):
        """The test split, the speed of writing, the record."""
        config, progress, test = self.config, self.progress, None
        if "test" in self.dataset.sizes:
            self.screen.bar.set_postfix_str("reading the test split")
            test = signals.unless_stopped(self.test_of_best, at_once=self.ranks.count == 1)
        progress["seconds"]["total"] = time.perf_counter() - self.started
        progress["others"] = self.neighbours.so_far()
        writing = None
        if self.ranks.is_first and not signals.caught:
            self.screen.bar.set_postfix_str("measuring the speed of writing")
            writing = signals.unless_stopped(self.speed_of_writing)
        wish = self.ranks.largest(self.wish(signals))
        if wish > SAVE:
            return self.stop(wish - SAVE, argv)
        if self.ranks.is_first:
            peak_memory = machines.peak_memory(self.machine)
            description = progress["machine"]
            record = records.record_of(
                config, self.dataset, self.model, description, progress, test, writing, peak_memory
            )
            self.folder.complete(record)
            self.screen.bar.close()
            self.screen.say(screen_report.final_report(record))
        return 0

    def speed_of_writing(self):
        """What `records.record_of` takes of it."""
        beside, started = machines.Neighbours(self.machine), time.perf_counter()
        speeds = evaluate.inference_speed(self.model, self.config, self.machine)
        return {"speeds": speeds, "seconds": time.perf_counter() - started, "others": beside.so_far()}

    def test_of_best(self):
        """The clean measure on the test split, of the best weights and not of those at hand, which are left as they
        are."""
        state = random_state()
        best = GPT(self.config, self.dataset.vocabulary.size).to(self.machine.device)
        set_random_state(state)  # the initial weights, drawn and thrown away
        best.load_state_dict(self.best["model"])
        return evaluate.clean(best, self.dataset, "test", self.config, self.machine, self.ranks)


def resume_command(argv, ranks):
    kept = [word for word in argv if not word.startswith(("--overwrite", "--init_from"))]
    ours = shlex.join([os.path.relpath(__file__), *kept, "--init_from=resume"])
    if ranks.count == 1:
        return f"python {ours}"
    return f"torchrun --nproc_per_node={ranks.on_machine} {'' if ranks.count == ranks.on_machine else '… '}{ours}"


# ---------------------------------------------------------------------------------------------------------------------


def main(argv):
    config = configurator.parse(
        Config, argv, usage="python train.py [config files] [--key=value …]", description=__doc__
    )
    ranks = Ranks.of_environment()
    ranks.check(config)
    with contextlib.ExitStack() as stack:
        heard = sys.stdout if ranks.is_first else stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(console.Lasting(heard)))
        machine = machines.choose(config.device, config.dtype, config.compile, ranks.local if ranks.count > 1 else None)
        machines.keep_freed_memory()
        ranks.join(machine.device)
        try:
            code = train(config, ranks, machine, argv)
            ranks.leave()
            return code
        except RuntimeError as error:
            if ranks.count == 1 or not is_loss_of_another(error):
                raise
            said = files.first_line(error)[:120]
            raise console.Failure(
                f"another of the {ranks.count} processes of this run has ended, or is lost ({said}): torchrun "
                f"says more below. What was saved is in {config.out_dir}; to go on: {resume_command(argv, ranks)}",
                console.LEFT_ALONE,
            ) from error


def train(config, ranks, machine, argv):
    folder = RunFolder(config)
    saved = folder.open()
    config = dataclasses.replace(config, init_from="resume" if saved else "scratch")
    print(machine.reason)
    if folder.note:
        print(folder.note)
    if ranks.is_first:
        prepare(config)
    ranks.wait()
    dataset = open_dataset(config, machine.device)
    changed = check_resumable(saved, config, dataset) if saved else []
    if saved and not changed and (folder / "summary.json").exists() and not config.eval_only:
        print(f"{folder} is complete: there is nothing to resume (a larger max_iters would go on).")
        print(screen_report.final_report(json.loads((folder / "summary.json").read_text())))
        return 0
    training = Training(config, ranks, machine, dataset, saved)
    step = training.progress["step"]
    ranks.agree({"step": step, "symbols": dataset.vocabulary.size, "characters": dataset.sizes["train"]})
    counts = accounting.count_parameters(training.model)
    print(
        f"{dataset.name}: {dataset.sizes['train']:,} {dataset.unit}s to train on, {dataset.vocabulary.size} symbols; "
        f"{counts['total']:,} parameters, {counts['active']:,} active per {dataset.unit}"
    )
    training.compile()
    if config.eval_only:
        if not saved:
            print("untrained weights: --init_from=resume evaluates those of out_dir")
        line = training.evaluation_line()
        print(evaluation_text(line, config))
        print(f"the papers' way: {line['paper']['val']:.4f} nats on {config.eval_iters} random batches")
        return 0
    training.note_machine()
    training.forecast(argv)
    if not ranks.is_first:
        return training.run(None, None, argv)
    with folder.writable(config, saved) as metrics:
        metrics.mirror = start_wandb(config)
        if not folder.is_locked:
            print(f"the file system of {folder} has no locks: nothing keeps a second run out of it")
        print(
            f"writing to {folder}"
            if not saved
            else f"resuming {folder} at step {step:,}"
            + "".join(f"; {key} is now {ours} (was {theirs})" for key, ours, theirs in changed)
        )
        return training.run(folder, metrics, argv)


if __name__ == "__main__":
    console.run(
        main,
        (ConfigError, DataError, FileError),
        "a smaller batch_size with gradient_accumulation_steps gives nearly the same updates",
    )
