"""Train a character-level GPT, dense or Mixture of Experts.

    python train.py config/shakespeare_moe4.py                       the papers' run, on a GPU
    python train.py config/shakespeare_moe4.py config/cpu.py         the same at CPU size
    python train.py config/shakespeare_dense.py --n_layer=4 --seed=2
    python train.py --help                                           every key

A run lives in its out_dir: config.json, metrics.jsonl (a line a log or evaluation), ckpt.pt (the last state), best.pt
(the best on the clean measure), and summary.json once it is complete. Ctrl-C saves; the same command with
--init_from=resume goes on. Exit codes: 0 done, 2 a mistake in what was asked, 3 loss or gradient not finite, 130 /
143 stopped by SIGINT / SIGTERM.
"""

import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import configurator
import evaluate
import machine as machines
import moe
import records
from checkpoint import CheckpointError
from configurator import ConfigError
from data.common import DataError, Dataset, find
from model import GPT
from settings import Config
from update import Sums, Updater, compile_model, random_state, set_random_state, undone

try:
    import fcntl
except ImportError:  # not on Windows: there nothing keeps two runs apart
    fcntl = None

SLOW_SECONDS = 900  # a run that would take longer than this on a CPU is told so, and of config/cpu.py
SECONDS_BETWEEN_LINES = 30  # of progress, where the output is not a terminal


# ---------------------------------------------------------------------------------------------------------------------
# Before the loop


def open_out_dir(config):
    """The run's folder, and the checkpoint to resume from or None. Refuses whatever would destroy or mix up a run."""
    folder = Path(config.out_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError([f"out_dir={config.out_dir} is a file; expected a folder, or a name for a new one"])
    held = [name for name in checkpoint.RUN_FILES if (folder / name).exists()]
    if config.init_from == "resume":
        if config.overwrite:
            raise ConfigError(["--init_from=resume goes on with a run and --overwrite=True throws it away: choose one"])
        if "ckpt.pt" not in held:
            raise CheckpointError(
                f"{folder} holds no ckpt.pt to resume from; start the run with --init_from=scratch"
                + (" --overwrite=True" if held else "")
            )
        try:
            return folder, checkpoint.load(folder / "ckpt.pt")
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; the run can be made again with --init_from=scratch --overwrite=True"
            ) from error
    if held and not config.overwrite and not config.eval_only:
        raise ConfigError(
            [
                f"{folder} holds {_what_it_holds(folder)}; nothing was changed. Choose one of:",
                *(["--init_from=resume goes on with it;"] if "ckpt.pt" in held else []),
                "--out_dir=… or another --seed=… makes this run elsewhere;",
                "--overwrite=True throws it away and starts again",
            ]
        )
    return folder, None


def _what_it_holds(folder):
    try:
        title = json.loads((folder / "config.json").read_text()).get("title") or "a run"
    except (OSError, ValueError, AttributeError):
        title = "a run"
    if (folder / "summary.json").exists():
        return f"a complete run ({title})"
    return f"an unfinished run ({title})"


def open_dataset(config, device):
    """The data set, prepared first when its bins are missing and config.prepare allows it."""
    folder = find(config.dataset)
    script = folder / "prepare.py"
    # Only a script of ours is run unasked; bins that are there without a meta.json are somebody's, and are told about.
    is_ours = folder.parent == machines.ROOT / "data" and script.exists()
    if is_ours and not all((folder / name).exists() for name in ("train.bin", "val.bin")):
        shown = os.path.relpath(script)
        if not config.prepare:
            raise DataError(
                f"{config.dataset} is not prepared, and --prepare=False forbids to do it now: python {shown}"
            )
        print(f"{config.dataset} is not prepared yet: running python {shown}", flush=True)
        if subprocess.run([sys.executable, str(script)]).returncode != 0:
            raise DataError(f"{config.dataset} could not be prepared (the reason is above)")
    dataset = Dataset.open(folder, device).train_on_first(config.train_characters)
    for split in ("train", "val"):
        if dataset.sizes.get(split, 0) <= config.block_size:
            raise DataError(
                f"the {split} split of {dataset.name} has {dataset.sizes.get(split, 0):,} characters: "
                f"too few for block_size={config.block_size}"
            )
    return dataset


def check_resumable(saved, config, dataset):
    """A checkpoint goes on only as the experiment that it is, on the text that it knows. -> what may differ and does"""
    theirs = Config.from_dict(saved["config"])
    # The text is compared by its hash below, for the same data set can be named in several ways.
    differing = [row for row in config.differences(theirs, ("experiment",)) if row[0] != "dataset"]
    if differing:
        raise CheckpointError(
            f"{config.out_dir} holds another experiment:\n"
            + "\n".join(f"  {key}={theirs!r} there, {ours!r} here" for key, ours, theirs in differing)
            + "\nResume with the same settings, or choose another --out_dir."
        )
    if saved["dataset"] != dataset.describe():
        there, here = (
            f"{data['name']} ({data['vocab_size']} symbols, splits {data['splits']}, SHA-256 {data['sha256'][:8]}…)"
            for data in (saved["dataset"], dataset.describe())
        )
        raise CheckpointError(f"{config.out_dir} was trained on another text: {there} there, {here} here")
    if saved["progress"]["step"] > config.max_iters:
        made = f"{saved['progress']['step']:,}"
        raise CheckpointError(
            f"{config.out_dir} has already made {made} updates, more than max_iters={config.max_iters}"
        )
    return config.differences(theirs, ("schedule",))


def difference(there, here):
    """Of two descriptions of machines: "cores 2, threads 2 there, cores 1, threads 1 here". there: None in a checkpoint
    that is older than its description."""
    if there is None:
        return f"which one is not known, {here['device']} here"
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    sides = (", ".join(f"{name} {machine.get(name)}" for name in names) for machine in (there, here))
    return "{} there, {} here".format(*sides)


def seconds_needed(model, dataset, config, machine, steps):
    """A rough forecast of `steps` updates and their evaluations, from two batches whose effect is undone (the first
    warms up)."""
    x, y = dataset.batch("train", config.seed, 0, config.batch_size, config.block_size)
    with undone(model):
        for _ in range(2):
            started = time.perf_counter()
            with machine.autocast():
                model.train()(x, y).objective.backward()
            seconds = time.perf_counter() - started
    windows = dataset.sizes["val"] / (config.batch_size * config.block_size)
    forwards = (2 * config.eval_iters + windows) * (steps // config.eval_interval + 1)
    return seconds * (steps * config.gradient_accumulation_steps + forwards / 3)


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
        interval.stats = [moe.RoutingStats(*(value.to(device) for value in layer)) for layer in state["stats"]]
        return interval

    def state(self):
        return {
            "steps": self.steps,
            "seconds": time.perf_counter() - self.started,
            "sums": self.terms,
            "stats": [list(layer) for layer in self.stats],
        }

    def line(self, step, made, tokens_per_step):
        """The interval's line of metrics.jsonl: means over its steps, in train mode. made: the Update of its last step,
        None where an earlier session made it."""
        means = {name: value.item() / self.steps for name, value in self.terms.items()}
        seconds = time.perf_counter() - self.started  # the .item() above waited for the device
        return {
            "kind": "train",
            "step": step,
            **means,
            "learning_rate": made.learning_rate if made else None,
            "gradient_norm": made.gradient_norm.item() if made else None,
            "step_ms": 1000 * seconds / self.steps,
            "tokens_per_second": tokens_per_step * self.steps / seconds,
            "routing": [moe.summarize(layer) for layer in self.stats],
        }


class Screen:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, config, start):
        self.bar = tqdm(
            total=config.max_iters, initial=start, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self.last_line = time.monotonic()

    def log(self, step, line):
        loss, speed = line["loss"], line["tokens_per_second"]
        numbers = f"loss {loss:.3f} nats, {evaluate.bits(loss):.3f} bpc, {speed:,.0f} tokens/s"
        self.bar.set_postfix_str(numbers, refresh=False)
        if self.bar.disable and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            remaining = (self.bar.total - step) * line["step_ms"] / 1000
            self.say(f"step {step:,} of {self.bar.total:,}: {numbers}, {records.duration(remaining)} left")

    def say(self, text):
        self.last_line = time.monotonic()
        if self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)


def evaluation_text(line, config, is_best=False):
    nats, bpc = line["clean"]["nats"], line["clean"]["bpc"]
    best = " (best so far)" if is_best else ""
    return f"step {line['step']:,} of {config.max_iters:,}: validation {nats:.4f} nats, {bpc:.4f} bpc{best}"


def evaluation_line(model, dataset, config, machine, step):
    clean = evaluate.clean(model, dataset, "val", config, machine)
    train, val = (evaluate.paper(model, dataset, split, config, machine, step) for split in ("train", "val"))
    return {
        "kind": "eval",
        "step": step,
        "clean": {"nats": clean.nats, "bpc": clean.bpc},
        "paper": {"train": train.nats, "val": val.nats, "train_with_aux": train.with_aux, "val_with_aux": val.with_aux},
        "load": [moe.summarize(layer)["load"] for layer in clean.stats or []],
        "routing": [
            moe.summarize(layer, in_detail=True) | evaluate.drop_rate_by_class(layer, dataset.vocabulary)
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
        print(f"wandb_log=True, but wandb says: {checkpoint.first_line(error)}; metrics go to metrics.jsonl only")
        return None
    return lambda line: wandb.log(
        {f"{line['kind']}/{key}": value for key, value in flat(line).items() if key != "kind"}, step=line["step"]
    )


def flat(line):
    """{"clean": {"nats": 1.5}} -> {"clean/nats": 1.5}; lists are left out."""
    numbers = {}
    for key, value in line.items():
        if isinstance(value, dict):
            numbers |= {f"{key}/{name}": inner for name, inner in value.items()}
        elif not isinstance(value, list):
            numbers[key] = value
    return numbers


class Metrics:
    """metrics.jsonl: one line a log or evaluation, appended. While it is open, no other run can have its folder."""

    def __init__(self, path):
        with checkpoint.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab")
        self.mirror = None
        if fcntl:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{path.parent} is in use by another run that has not ended") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def cut(self, length):
        """Keep the first `length` bytes: what came after a checkpoint did not happen."""
        if self.file.tell() < length:
            raise CheckpointError(
                f"{self.file.name} is shorter than when its checkpoint was written: something else changed it; "
                "start again with --init_from=scratch --overwrite=True"
            )
        self.file.truncate(length)

    def write(self, line):
        with checkpoint.writing(self.file.name):
            self.file.write((json.dumps(line, allow_nan=False) + "\n").encode())
            self.file.flush()
        if self.mirror:
            self.mirror(line)

    def sync(self):
        """Make it durable. -> its length in bytes"""
        with checkpoint.writing(self.file.name):
            os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)


class Stopped(Exception):
    """A signal came while nothing was half done."""


class StopSignals:
    """Inside it, SIGINT and SIGTERM do not stop the program: `caught` lists them for the loop to look at. Within
    `may_stop`, one is raised as Stopped at once. A second signal stops the program on the spot."""

    def __enter__(self):
        self.caught, self.raising = [], False
        self.before = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number, frame):
        self.caught.append(number)
        signal.signal(number, signal.SIG_DFL)
        if self.raising:
            raise Stopped

    @contextlib.contextmanager
    def may_stop(self):
        self.raising = True
        try:
            yield
        except Stopped:
            pass
        finally:
            self.raising = False


# ---------------------------------------------------------------------------------------------------------------------


def main(argv):
    config = configurator.parse(
        Config, argv, usage="python train.py [config files] [--key=value …]", description=__doc__
    )
    machine = machines.choose(config.device, config.dtype, config.compile)
    machines.keep_freed_memory()
    device = machine.device
    folder, saved = open_out_dir(config)
    print(machine.reason)
    dataset = open_dataset(config, device)
    changed = check_resumable(saved, config, dataset) if saved else []
    if saved and not changed and (folder / "summary.json").exists() and not config.eval_only:
        print(f"{folder} is complete: there is nothing to resume (a larger max_iters would go on).")
        print(records.report(json.loads((folder / "summary.json").read_text())))
        return 0

    torch.manual_seed(config.seed)
    model = GPT(config, dataset.vocabulary.size, dataset.symbol_counts("train")).to(device)
    updater = Updater(model, config, machine)
    progress = {
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
    if saved:
        model.load_state_dict(saved["model"])
        updater.optimizer.load_state_dict(saved["optimizer"])
        git, before = progress["git"], saved["progress"]["git"]
        is_clean = before["dirty"] is False and git["dirty"] is False
        is_clean = is_clean and machines.same_code(before["commit"], git["commit"])
        progress = {**saved["progress"], "resumed": saved["progress"]["resumed"] + 1}
        progress["git"] = {"commit": git["commit"], "dirty": not is_clean}  # else no commit says what made this run
    seconds = progress["seconds"]
    rows = config.batch_size * config.gradient_accumulation_steps
    tokens_per_step = rows * config.block_size
    counts = model.count_parameters()
    print(
        f"{dataset.name}: {dataset.sizes['train']:,} {dataset.unit}s to train on, {dataset.vocabulary.size} symbols; "
        f"{counts['total']:,} parameters, {counts['active']:,} active per {dataset.unit}"
    )

    session_started = time.perf_counter() - seconds["total"]
    neighbours = machines.Neighbours(machine, progress["others"])
    if machine.compile:
        compiled = compile_model(
            model, *dataset.batch("train", config.seed, 0, config.batch_size, config.block_size), machine
        )
        if compiled.failure:
            print(f"torch.compile failed, so this run is not compiled: {compiled.failure}")
        updater.run_model = compiled.model
        seconds["compile"] += compiled.seconds
        machine = machine._replace(compile=not compiled.failure)
    if config.eval_only:
        if not saved:
            print("untrained weights: --init_from=resume evaluates those of out_dir")
        line = evaluation_line(updater.run_model, dataset, config, machine, progress["step"])
        print(evaluation_text(line, config))
        print(f"the papers' way: {line['paper']['val']:.4f} nats on {config.eval_iters} random batches")
        return 0
    here, there = machines.describe(machine), progress.get("machine")
    if saved and there != here:
        neighbours.before = machines.UNKNOWN
        print(f"resumed on another machine ({difference(there, here)}): its times will not count")
    progress["machine"] = here
    if device.type == "cpu":
        forecast = seconds_needed(model, dataset, config, machine, config.max_iters - progress["step"])
        if forecast > SLOW_SECONDS:
            print(
                f"At the speed of its first steps, this run needs about {records.duration(forecast)} on this machine."
            )
            overlay = os.path.relpath(machines.ROOT / "config" / "cpu.py")
            if overlay not in argv:
                words = [word for word in argv if not word.startswith("--out_dir")]
                print(f"The size made for a CPU: {shlex.join(['python', os.path.relpath(__file__), *words, overlay])}")

    if not saved:
        open_out_dir(config)  # again, for another run may have come while this one got ready
    metrics = Metrics(folder / "metrics.jsonl")
    for name in ("summary.json",) if saved else [name for name in checkpoint.RUN_FILES if name != "metrics.jsonl"]:
        (folder / name).unlink(missing_ok=True)
    metrics.cut(progress["metrics_bytes"])
    checkpoint.write_json(folder / "config.json", config.to_dict())
    metrics.mirror = start_wandb(config)
    print(
        f"writing to {folder}"
        if not saved
        else f"resuming {folder} at step {progress['step']:,}"
        + "".join(f"; {key} is now {ours} (was {theirs})" for key, ours, theirs in changed)
    )

    def save(name="ckpt.pt"):
        started = time.perf_counter()
        seconds["total"] = time.perf_counter() - session_started
        progress["others"] = neighbours.so_far()
        progress["metrics_bytes"] = metrics.sync()
        checkpoint.save(
            folder / name,
            {
                "config": config.to_dict(),
                "dataset": dataset.describe(),
                "vocabulary": dataset.vocabulary.to_dict(),
                "model": model.state_dict(),
                "optimizer": updater.optimizer.state_dict(),
                "progress": progress,
                "interval": interval.state(),
                "random": random_state(),
            },
        )
        seconds["save"] += time.perf_counter() - started

    def log(made):
        nonlocal interval
        line = interval.line(progress["step"], made, tokens_per_step)
        seconds["train"] += line["step_ms"] * interval.steps / 1000
        progress["step_ms"].append(line["step_ms"])
        progress["train_mode"].append([interval.steps, line["loss"], line["objective"]])
        metrics.write(line)
        screen.log(progress["step"], line)
        interval = Interval()

    def stopped():
        bad_step = updater.guard.first_bad_step()
        if bad_step is not None:
            return stop_not_finite(f"the loss or a gradient of step {bad_step:,}", folder)
        save()
        number = signals.caught[0]
        screen.say(f"\nstopped by {signal.Signals(number).name} after step {progress['step']:,}; saved. To go on:")
        screen.say(f"  {resume_command(argv)}")
        return 128 + number

    screen = Screen(config, progress["step"])
    interval = Interval.from_state(saved["interval"], device) if saved else Interval()
    if saved:
        set_random_state(saved["random"])
        if progress["evaluations"] and best_of(progress["evaluations"])["step"] == progress["step"]:
            save("best.pt")  # in case the power failed just before

    with metrics, StopSignals() as signals, screen.bar:
        while True:
            step = progress["step"]  # updates made so far
            model.set_step(step)
            evaluated = progress["evaluations"][-1]["step"] if progress["evaluations"] else -1
            if (
                evaluated < step
                and (step % config.eval_interval == 0 or step >= config.max_iters)
                and not signals.caught
            ):
                if interval.steps:  # resumed between two log lines, to be evaluated sooner than planned then
                    log(None)
                screen.bar.set_postfix_str("evaluating")
                started, line = time.perf_counter(), None
                with signals.may_stop():
                    line = evaluation_line(updater.run_model, dataset, config, machine, step)
                if line is None:
                    return stopped()
                seconds["eval"] += time.perf_counter() - started
                line |= {"train_mode": train_mode(progress["train_mode"]), "train_seconds": seconds["train"]}
                progress["train_mode"] = []
                if not math.isfinite(line["clean"]["nats"]):
                    return stop_not_finite(f"the validation loss at step {step:,}", folder)
                is_best = all(line["clean"]["nats"] < past["clean"]["nats"] for past in progress["evaluations"])
                for past in progress["evaluations"]:
                    past.pop("routing", None)  # metrics.jsonl has it
                progress["evaluations"].append(line)
                metrics.write(line)
                interval = Interval()
                save()
                if is_best:
                    save("best.pt")
                interval = Interval()  # saving is not training time
                screen.say(evaluation_text(line, config, is_best))
            if signals.caught:
                return stopped()
            if step >= config.max_iters:
                break

            # One update. Its rows depend on the seed and the step alone.
            x, y = dataset.batch("train", config.seed, step, rows, config.block_size)
            made = updater.update(step, x, y, interval)
            progress["step"] = step = step + 1
            screen.bar.update()

            # Once in a while: read what the device has summed up, and look whether it went well.
            if step % config.log_interval == 0 or step % config.eval_interval == 0 or step == config.max_iters:
                bad_step = updater.guard.first_bad_step()
                if bad_step is not None:
                    return stop_not_finite(f"the loss or a gradient of step {bad_step:,}", folder)
                log(made)

        test = None
        if "test" in dataset.sizes:
            screen.bar.set_postfix_str("reading the test split")
            with signals.may_stop():
                test = test_of_best(dataset, config, machine, folder, progress)
            if test is None:
                return stopped()
        seconds["total"] = time.perf_counter() - session_started
        progress["others"] = neighbours.so_far()
        screen.bar.set_postfix_str("measuring the speed of writing")
        speeds, started, beside = None, time.perf_counter(), machines.Neighbours(machine)
        with signals.may_stop():
            speeds = evaluate.inference_speed(model, config, machine)
        if speeds is None:
            return stopped()
        writing = {"speeds": speeds, "seconds": time.perf_counter() - started, "others": beside.so_far()}

    description, peak_memory = machines.describe(machine), machines.peak_memory(machine)
    record = records.record_of(config, dataset, model, description, progress, test, writing, peak_memory)
    checkpoint.write_json(folder / "summary.json", record)
    print(records.report(record))
    return 0


def stop_not_finite(what, folder):
    kept = folder / "ckpt.pt"
    print(
        f"{what} is not finite: stopped before that update. "
        + (f"The last good checkpoint is {kept}." if kept.exists() else "There is no checkpoint yet.")
        + " A lower learning_rate, a longer warmup_iters or a z_loss_coef of 1e-3 may help.",
        file=sys.stderr,
    )
    return 3


def resume_command(argv):
    kept = [word for word in argv if not word.startswith(("--overwrite", "--init_from"))]
    return shlex.join(["python", os.path.relpath(__file__), *kept, "--init_from=resume"])


def best_of(evaluations):
    return min(evaluations, key=lambda line: line["clean"]["nats"])


def test_of_best(dataset, config, machine, folder, progress):
    """The clean measure on the test split, of best.pt and not of the weights at hand, which are left as they are."""
    saved = checkpoint.load(folder / "best.pt")
    best_step = best_of(progress["evaluations"])["step"]
    if saved["progress"]["step"] != best_step:
        raise CheckpointError(
            f"{folder / 'best.pt'} is of step {saved['progress']['step']}, but this run was best at {best_step}: "
            "something else wrote it; make the run again with --init_from=scratch --overwrite=True"
        )
    state = random_state()
    best = GPT(config, dataset.vocabulary.size).to(machine.device)
    set_random_state(state)  # the initial weights, drawn and thrown away
    best.load_state_dict(saved["model"])
    return evaluate.clean(best, dataset, "test", config, machine)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except configurator.Message as message:
        print(message)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(
            f"train.py: out of memory ({checkpoint.first_line(error)}); a smaller batch_size with ",
            file=sys.stderr,
            end="",
        )
        print("gradient_accumulation_steps gives the same updates", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"train.py: {error.filename or 'a file'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("train.py: stopped before the first step", file=sys.stderr)
        sys.exit(130)
