"""The folder of a run: its files, the lock on it, and the checkpoint from which the run resumes.

    folder = RunFolder(config)
    saved = folder.open()                        # the checkpoint to resume from, or None; nothing is written yet
    with folder.writable(identity, saved) as metrics:
        metrics.write(line)
        folder.save(state, is_best=True)         # ckpt.pt, best.pt
        folder.complete(record)                  # summary.json

config.json       every key, the text's SHA-256, the kind of machine, and whether the run is straight: see identity.py
metrics.jsonl     a line a log or evaluation, appended; a checkpoint knows how long it was
ckpt.pt           the whole state after some step, with the best weights so far
ckpt.previous.pt  the checkpoint before it, in case the disk damages ckpt.pt; removed when the run is complete
best.pt           the best weights so far, for sample.py; the run itself reads those in ckpt.pt
diverged.json     where a loss or gradient was not finite, and the config; removed when the run is complete
snapshots/        step-000100.pt, …: the weights after so many updates, with save_every, for analyze.py
summary.json      the record, of a complete run only
"""

import contextlib
import dataclasses
import json
import os
import re
from pathlib import Path

from run import checkpoint
from run import identity as run_identity
from run.checkpoint import CheckpointError
from run.settings import Config, one_list
from run.update import NotFinite
from support import files
from support.options import EXPERIMENT, SCHEDULE, ConfigError
from support.schema import OBJECT, TEXT, mismatches

REFUSED = "ckpt.refused.pt"  # the new name of a damaged ckpt.pt, kept for inspection
AGAIN = "--init_from=scratch --overwrite=True makes the run again"
# May change when a run goes on whose loss or gradient was not finite.
REMEDIES = ("learning_rate", "min_lr", "warmup_iters", "grad_clip", "z_loss_coef")
DIVERGED = {"reason": TEXT, "config": OBJECT}  # diverged.json
STATE = ("config", "dataset", "vocabulary", "model", "optimizer", "best", "progress", "processes")  # of a checkpoint


class RunFolder:
    """out_dir, as a config names it."""

    def __init__(self, config):
        self.config, self.path = config, Path(config.out_dir)
        self.read = "ckpt.pt"  # the checkpoint to resume from
        self.version = None  # of that file: see version_of
        self.note = None  # why another checkpoint than ckpt.pt is read
        self.file, self.is_locked = None, False  # metrics.jsonl while the run writes, and whether a lock is held on it

    def __str__(self):
        return str(self.path)

    def __truediv__(self, name):
        return self.path / name

    def held(self):
        """The names of a run's files that exist; an empty metrics.jsonl does not count."""
        files = [name for name in checkpoint.RUN_FILES if (self / name).exists()]
        return [name for name in files if name != "metrics.jsonl" or (self / name).stat().st_size]

    # -----------------------------------------------------------------------------------------------------------------
    # Before the run

    def open(self):
        """The checkpoint to resume from, or None for a new run. ConfigError or CheckpointError where that is impossible
        or would destroy something."""
        config, held = self.config, self.held()
        if self.path.is_symlink() and not self.path.exists():
            raise ConfigError([f"out_dir={config.out_dir} is a link to {os.readlink(self.path)}, which is not there"])
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError([f"out_dir={config.out_dir} is a file; expected a folder, or a name for a new one"])
        has_checkpoint = "ckpt.pt" in held or "ckpt.previous.pt" in held
        goes_on = config.init_from in ("resume", "auto")
        if goes_on and config.overwrite:
            going_on = f"--init_from={config.init_from} goes on with a run"
            raise ConfigError([f"{going_on} and --overwrite=True throws it away: choose one"])
        if has_checkpoint and goes_on:
            if config.init_from == "auto":
                self.refuse_to_diverge_again()
            return self.newest_good()
        if config.init_from == "resume":
            words = "--init_from=scratch --overwrite=True" if held else "--init_from=scratch"
            raise CheckpointError(f"{self} holds no ckpt.pt to resume from; start the run with {words}")
        if config.init_from == "auto" and set(held) <= {"config.json", "metrics.jsonl"}:
            return None  # an empty folder, or a run that was stopped before its first checkpoint
        if held and not config.overwrite and not config.eval_only:
            kind, going_on = "an unfinished", "--init_from=resume goes on with it;"
            if "summary.json" in held:
                kind, going_on = (
                    "a complete",
                    "--init_from=resume extends it, but as a rule its record then enters no mean;",
                )
            raise ConfigError(
                [
                    f"{self} holds {kind} run; nothing was changed. Choose one of:",
                    *([going_on] if has_checkpoint else []),
                    "--out_dir=… or another --seed=… makes this run elsewhere;",
                    "--overwrite=True throws it away and starts again",
                ]
            )
        return None

    @property
    def has_diverged(self):
        """Whether a loss or gradient of this run was not finite."""
        return (self / "diverged.json").exists()

    def refuse_to_diverge_again(self):
        """NotFinite where this config has already run into a loss or gradient that is not finite."""
        reason = None if self.config.eval_only else last_divergence(self.path, self.config)
        if reason:
            raise NotFinite(f"{reason} (of the last try, which init_from=auto does not repeat unchanged)")

    def newest_good(self):
        """The content of ckpt.pt; where it is damaged, of the checkpoint before it, and then `note` says so."""
        problems = []
        for self.read in ("ckpt.pt", "ckpt.previous.pt"):
            if problems and not (self / self.read).exists():
                break
            self.version = version_of(self / self.read)  # before it is read
            try:
                saved = checkpoint.load(self / self.read)
                self.check(saved)
            except checkpoint.Unreadable:
                raise
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if problems:
                step = f"step {saved['progress']['step']:,}"
                self.note = f"{problems[0]}. Going on from the checkpoint before it: {self / self.read}, of {step}."
                self.note += f" The other stays, as {REFUSED}." if (self / "ckpt.pt").exists() else ""
            return saved
        raise CheckpointError(f"{'; and '.join(problems)}; {AGAIN}")

    def check(self, saved):
        """CheckpointError where a checkpoint lacks a part, or metrics.jsonl has lost lines since then."""
        missing = [name for name in STATE if name not in saved]
        if missing:
            raise CheckpointError(f"{self / self.read} is no checkpoint of a run: it lacks {', '.join(missing)}")
        metrics, known = self / "metrics.jsonl", saved["progress"]["metrics_bytes"]
        length = metrics.stat().st_size if metrics.exists() else 0
        if length < known and not self.config.eval_only:
            sizes = f"{length:,} bytes, {known:,} when {self.read} was written"
            raise CheckpointError(f"{metrics} is shorter than it was: something else changed it ({sizes})")

    # -----------------------------------------------------------------------------------------------------------------
    # During the run

    @contextlib.contextmanager
    def writable(self, identity, saved):
        """Lock the folder and prepare it for a run that resumes from `saved` (None: a new run). -> its Metrics

        The folder belongs to this run alone until the context ends. CheckpointError where another run has it.
        """
        with files.writing(self / "metrics.jsonl"):
            self.path.mkdir(parents=True, exist_ok=True)
            files.sync_folder(self.path.parent)
            file = open(self / "metrics.jsonl", "ab", buffering=0)
        with file:
            locked = files.lock(file)
            if locked is False:
                raise CheckpointError(f"{self} is in use by another run that has not ended")
            self.file, self.is_locked = file, bool(locked)
            # Another run may have written here while this one got ready.
            if saved and version_of(self / self.read) != self.version or not saved and self.open():
                raise CheckpointError(f"another run has been at work in {self} meanwhile; nothing was changed")
            with files.writing(self.path):
                if saved and self.read != "ckpt.pt":
                    if (self / "ckpt.pt").exists():
                        os.replace(self / "ckpt.pt", self / REFUSED)
                    os.replace(self / self.read, self / "ckpt.pt")
                gone = ["summary.json"] if saved else [name for name in checkpoint.RUN_FILES if name != "metrics.jsonl"]
                for name in [*gone, *(f"{name}.partial" for name in checkpoint.RUN_FILES)]:
                    (self / name).unlink(missing_ok=True)
                for step, path in snapshots_in(self.path):
                    if not saved or step > saved["progress"]["step"]:
                        path.unlink()
                file.truncate(saved["progress"]["metrics_bytes"] if saved else 0)  # later lines are made again
            run_identity.write(self / "config.json", identity)
            if saved and saved["best"]:
                self.save_best(saved)  # a power cut may have prevented it
            try:
                yield Metrics(file)
            except NotFinite as error:
                files.write_json(self / "diverged.json", {"reason": str(error), "config": identity.config.to_dict()})
                raise

    def save(self, state, is_best):
        """Write ckpt.pt, and keep the old one as ckpt.previous.pt. is_best: also write best.pt, from state["best"].

        What metrics.jsonl holds is on the disk before the checkpoint that knows its length.
        """
        metrics = self / "metrics.jsonl"
        if not metrics.exists() or not os.path.samestat(os.stat(metrics), os.fstat(self.file.fileno())):
            raise CheckpointError(f"{self} was deleted or replaced while this run went on: nothing more is written")
        with files.writing(metrics):
            os.fsync(self.file.fileno())
        checkpoint.save(self / "ckpt.pt", state, previous=self / "ckpt.previous.pt")
        if is_best:
            self.save_best(state)

    def undo_save(self):
        """Where the last state is not to be resumed from: ckpt.pt becomes the one before it, or goes if it was the
        first."""
        if (self / "ckpt.previous.pt").exists():
            os.replace(self / "ckpt.previous.pt", self / "ckpt.pt")
        else:
            (self / "ckpt.pt").unlink(missing_ok=True)

    def save_best(self, state):
        self.save_weights("best.pt", state, state["best"])

    def save_weights(self, name, about, weights):
        """about: a dict with config, dataset and vocabulary; weights: {"step", "model"}."""
        kept = {name: about[name] for name in ("config", "dataset", "vocabulary")}
        checkpoint.save(self / name, {**kept, **weights})

    def save_snapshot(self, about, weights):
        """Write the weights of one step to snapshots/: see save_weights."""
        with files.writing(self / "snapshots"):
            (self / "snapshots").mkdir(exist_ok=True)
        self.save_weights(f"snapshots/step-{weights['step']:06}.pt", about, weights)

    def complete(self, record):
        """Write the record of the complete run, its last file."""
        for name in ("ckpt.previous.pt", "diverged.json"):
            (self / name).unlink(missing_ok=True)
        files.write_json(self / "summary.json", record)


def last_divergence(folder, config) -> str | None:
    """Which loss or gradient was not finite when this config was last tried in a folder; None where none was, or
    another config was tried. CheckpointError where its diverged.json cannot be used."""
    path = Path(folder, "diverged.json")
    if not path.exists():
        return None
    try:
        last = files.read_json(path)
        for problem in mismatches(last, DIVERGED, "it"):
            raise ValueError(problem)
        tried = Config.from_dict(last["config"])
    except (OSError, ValueError) as error:
        why = f"{path} cannot be used: {files.first_line(error)}"
        raise CheckpointError(f"{why}; delete it to try these settings again") from error
    return None if config.differences(tried, (EXPERIMENT, SCHEDULE)) else last["reason"]


def snapshots_in(folder):
    """[(step, path)] of the weights that a run kept with save_every, in order."""
    found = [(re.fullmatch(r"step-(\d{6,18})\.pt", path.name), path) for path in Path(folder, "snapshots").glob("*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match)


def version_of(path):
    """A value that changes when the file is replaced or written to; None where there is none."""
    if not path.exists():
        return None
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


class Metrics:
    """metrics.jsonl, a line a log or evaluation. file: open for appending bytes, unbuffered; mirror: also gets the
    lines."""

    def __init__(self, file):
        self.file, self.mirror = file, None

    def write(self, line):
        with files.writing(self.file.name):
            content = (json.dumps(line, allow_nan=False) + "\n").encode()
            while content:
                content = content[self.file.write(content) :]
        if self.mirror:
            self.mirror(line)

    @property
    def length(self):
        """In bytes."""
        return self.file.seek(0, os.SEEK_END)


# ---------------------------------------------------------------------------------------------------------------------
# Whether a checkpoint fits a run


def check_resumable(saved, config, dataset, has_diverged=False):
    """CheckpointError unless the config is the checkpoint's experiment, but for REMEDIES where it has diverged, on the
    same text. -> the permitted differences, as Config.differences has them"""
    theirs = Config.from_dict(saved["config"])
    theirs = dataclasses.replace(theirs, n_expert_by_block=one_list(theirs.n_expert_by_block))
    # The text is compared by its hash below, for the same data set can be named in several ways.
    changed = [row for row in config.differences(theirs, (EXPERIMENT, SCHEDULE)) if row[0] != "dataset"]
    remedies = REMEDIES if has_diverged else ()
    differing = [row for row in config.differences(theirs, (EXPERIMENT,)) if row[0] not in ("dataset", *remedies)]
    if differing:
        raise CheckpointError(
            f"{config.out_dir} holds another experiment:",
            *(f"{key}={theirs!r} there, {ours!r} here" for key, ours, theirs in differing),
            "Resume with the same settings, or choose another --out_dir.",
        )
    if saved["dataset"] != dataset.describe():
        differing = texts(saved["dataset"], dataset.describe())
        what = "text" if saved["dataset"]["sha256"] != dataset.source_sha256 else "preparation of its text"
        way_out = "prepare it as it was, or choose another --out_dir"
        raise CheckpointError(f"{config.out_dir} was trained on another {what}: {differing}; {way_out}")
    if saved["progress"]["step"] > config.max_iters:
        made = f"{saved['progress']['step']:,} updates"
        raise CheckpointError(f"{config.out_dir} has already made {made}, more than max_iters={config.max_iters}")
    return changed


def texts(there, here):
    """Two data sets, there and here, side by side. there, here: of Dataset.describe."""
    sides = (
        f"{data['name']} (vocabulary of {data['vocab_size']} {data['unit']}s, splits {data['splits']}, "
        f"SHA-256 {data['sha256'][:8]}…)"
        for data in (there, here)
    )
    return "{} there, {} here".format(*sides)


def difference(there, here):
    """What differs between two machines: "cores 2, threads 2 there, cores 1, threads 1 here". there, here: of
    machines.describe; there is None in old checkpoints."""
    if there is None:
        return f"which one is not known, {here['device']} here"
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    sides = (
        ", ".join(f"{name} {machine[name]}" if name in machine else f"no {name}" for name in names)
        for machine in (there, here)
    )
    return "{} there, {} here".format(*sides)
