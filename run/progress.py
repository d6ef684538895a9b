"""What a person sees of a run: a progress bar or lines, evaluations, warnings, and Weights & Biases.

    with Screen(config, start=0, is_shown=True, say=print) as screen:
        screen.log(step, line)                        # after each log line
        screen.say(evaluation_text(line, config))

Nothing here prints by itself: `say` is the script's print.
"""

import os
import shlex
import sys
import time
from pathlib import Path

from tqdm import tqdm

from run.evaluate import bits
from run.state import change_of_code
from support import console, files
from support.config_files import run_file
from support.files import ROOT

SECONDS_BETWEEN_LINES = 30  # of progress, where the output is no terminal
STEPS_TO_TIME, SLOW_SECONDS = 20, 900  # after so many steps, a CPU run with so much time left is told about cpu.py
CPU_OVERLAY = ROOT / "config" / "cpu.py"
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")


class Screen:
    """A progress bar on a terminal; elsewhere a line now and then.

    start: the first step; is_shown: whether this process shows the bar; slow_hint: what to add where the run will take
    long, None to say nothing about that.
    """

    def __init__(self, config, start, is_shown, say, slow_hint=None):
        self.bar = tqdm(
            total=config.max_iters,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not is_shown or not sys.stderr.isatty(),
            file=console.IgnoreClosedPipe(sys.stderr),
        )
        self.start, self.print, self.slow_hint = start, say, slow_hint
        self.last_line = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def say(self, text):
        self.last_line = time.monotonic()
        self.bar.clear()
        self.print(text, flush=True)

    def doing(self, text):
        """Show beside the bar what goes on between two steps."""
        self.bar.set_postfix_str(text)

    def log(self, step, line):
        """Show the numbers of a log line."""
        loss, speed = line["loss"], line["tokens_per_second"]
        numbers = f"loss {loss:.3f} nats, {bits(loss):.3f} bpc, {speed:,.0f} tokens/s"
        remaining = (self.bar.total - step) * line["step_ms"] / 1000
        self.bar.set_postfix_str(numbers, refresh=False)
        if self.slow_hint is not None and step - self.start >= STEPS_TO_TIME:
            if remaining > SLOW_SECONDS:
                self.say(f"At this speed the run needs {console.duration(remaining)} more. {self.slow_hint}".strip())
            self.slow_hint = None
        if self.bar.disable and time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.say(f"step {step:,} of {self.bar.total:,}: {numbers}, {console.duration(remaining)} left")


# ---------------------------------------------------------------------------------------------------------------------
# Lines of text


def opening_lines(folder, saved, state, changed, start, is_straight):
    """What a person reads before the first step. changed: (key, ours, theirs) of a resumed run; start: the run whose
    weights begin this one, or None."""
    if not folder.is_locked:
        yield f"the file system of {folder} has no locks: nothing keeps a second run out of it"
    changes = "".join(f"; {key} is now {ours} (was {theirs})" for key, ours, theirs in changed)
    yield f"resuming {folder} at step {state.step:,}{changes}" if saved else f"writing to {folder}"
    if saved and (why := change_of_code(saved["progress"]["git"], state.git)):
        yield f"{folder} was {why}: its record will enter no mean"
    if start:
        yield f"The weights are those of {start}."
    if not is_straight:
        yield "This is not a straight run of its config, so its record will enter no mean."


def evaluation_text(line, config, is_best=False):
    """One line about an evaluation. line: as evaluate.evaluation makes it."""
    nats, bpc, train = line["clean"]["nats"], line["clean"]["bpc"], line["paper"]["train"]
    best = " (best so far)" if is_best else ""
    found = f"validation {nats:.4f} nats, {bpc:.4f} bpc{best}; train {train:.4f} nats ({config.eval_iters} batches)"
    of = "" if config.eval_only else f" of {config.max_iters:,}"  # the steps may be another run's
    return f"step {line['step']:,}{of}: {found}"


def weights_text(start, dataset):
    """Which weights are evaluated on which text. start: a start.Start; None for untrained weights."""
    text = f"{dataset.name} ({dataset.sizes['val']:,} {dataset.unit}s of validation)"
    if not start:
        whose = "--init_from=resume evaluates those of out_dir, --init_from=RUN the best ones of another run"
        return f"evaluating untrained weights on {text}; {whose}"
    other = "" if start.text["sha256"] == dataset.source_sha256 else ", another text"
    return f"evaluating {start} on {text}{other}"


def collapse_warnings(evaluations, config):
    """A warning for each router that the last evaluation found collapsed, and the one before did not. The untrained
    model at step 0 does not count."""
    line, before = evaluations[-1], [past for past in evaluations[:-1] if past["step"]]
    known = before[-1].get("collapsed", ()) if before else ()
    for block in line["collapsed"] if line["step"] else ():
        if block not in known:
            load = line["load"][config.moe_layers.index(block)]
            yield (
                f"warning: the router of block {block} has collapsed: of its {len(load)} experts, one gets "
                f"{max(load):.0%} of the choices, the least {min(load):.1%}"
            )


def resume_command(script, argv, processes):
    """The shell command that resumes the run of these arguments."""
    kept = [word for word in argv if not word.startswith(("--overwrite", "--init_from"))]
    ours = shlex.join([os.path.relpath(script), *kept, "--init_from=resume"])
    local, total = processes.local_world_size, processes.world_size
    if total == 1:
        return f"python {ours}"
    return f"torchrun --nproc_per_node={local} {'' if total == local else '… '}{ours}"


def not_finite_text(error, config, script, argv, processes):
    """What a person can do about a run that diverged, with the command that resumes it at half the learning rate.
    error: an update.NotFinite."""
    kept, stopped = Path(config.out_dir) / "ckpt.pt", f"{error} is not finite: stopped there."
    advice = "longer warmup_iters, a lower grad_clip or a z_loss_coef of 1e-3 may help too"
    if not kept.exists():
        return f"{stopped} There is no checkpoint yet. A lower learning_rate may help; {advice}."
    rate = config.learning_rate / 2
    words = [word for word in argv if not word.startswith(("--learning_rate", "--min_lr"))]
    words += [f"--learning_rate={rate}", f"--min_lr={min(config.min_lr, rate)}"]
    last = f"The last good checkpoint is {kept}; {advice}. To go on from it with half the learning rate"
    return f"{stopped} {last}: {resume_command(script, words, processes)}"


def lost_process_text(error, config, processes, command):
    """What happened where another process of the run is gone. command: which resumes the run."""
    lost = f"another of the {processes.world_size} processes of this run has ended, or is lost"
    reason = f"({files.first_line(error)[:120]}): torchrun says more below"
    return f"{lost} {reason}. What was saved is in {config.out_dir}; to go on: {command}"


def cpu_size_hint(script, argv):
    """How to make the run of these arguments at CPU size; empty where they have config/cpu.py."""
    if any(is_cpu_overlay(word) for word in argv):
        return ""
    words = [word for word in argv if not word.startswith(("--out_dir", "--init_from", "--overwrite"))]
    command = shlex.join(["python", os.path.relpath(script), *words, os.path.relpath(CPU_OVERLAY)])
    return f"The size made for a CPU: {command}"


def overridden_cpu_size(script, argv):
    """A warning where a config file after config/cpu.py changes the sizes that it sets; empty otherwise."""
    names = [word for word in argv if word.endswith(".py") and not word.startswith("-")]
    at = next((i for i, name in enumerate(names) if is_cpu_overlay(name)), len(names))
    for name in names[at + 1 :]:
        small, values = (run_file(path).values for path in (CPU_OVERLAY, absolute(name)))
        changed = [f"{key}={values[key]}" for key in SIZES if key in values and values[key] != small.get(key)]
        if changed:
            overlay = names.pop(at)
            command = shlex.join(["python", os.path.relpath(script), *names, overlay])
            return f"warning: {name} comes after {overlay} and sets {', '.join(changed)}; for the CPU size: {command}"
    return ""


def is_cpu_overlay(name):
    return absolute(name) == CPU_OVERLAY


def absolute(name):
    return Path(os.path.abspath(files.expanded(name)))


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases


def start_wandb(config, run_id, say):
    """A function that logs one line of metrics to Weights & Biases, or None. A tracker must not stop what it tracks:
    every failure is only said. run_id: of the run there, which goes on if it exists and begins if not."""
    if not config.wandb_log:
        return None
    name = config.wandb_run_name or config.title
    try:
        import wandb

        wandb.init(project=config.wandb_project, name=name, config=config.to_dict(), id=run_id, resume="allow")
    except Exception as error:  # not installed, not logged in, no network, …
        say(f"wandb_log=True, but wandb cannot be used ({files.first_line(error)}): metrics go to metrics.jsonl only")
        return None
    is_well = True

    def log(line):
        nonlocal is_well
        numbers = {f"{line['kind']}/{key}": value for key, value in flattened(line).items() if key != "kind"}
        try:
            if is_well:
                wandb.log(numbers, step=line["step"])
        except Exception as error:
            is_well = False
            say(f"wandb says: {files.first_line(error)}; from here on metrics go to metrics.jsonl only")

    return log


def flattened(line):
    """{"clean": {"nats": 1.5}} -> {"clean/nats": 1.5}; lists are left out."""
    numbers = {key: value for key, value in line.items() if not isinstance(value, (dict, list))}
    nested = {key: value for key, value in line.items() if isinstance(value, dict)}
    return numbers | {f"{key}/{name}": value for key, inner in nested.items() for name, value in inner.items()}
