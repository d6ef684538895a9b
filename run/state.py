"""Where a run stands: its counters and clocks, and what a checkpoint holds besides.

    state = TrainingState(git=machines.git_state())
    saved = checkpoint_of(config, dataset, model, optimizer, state, best, totals, processes)
    state = restore(saved, model, optimizer, git)      # and later
    totals, random = own_part(saved, config, processes, device)

A checkpoint's keys: config, dataset, vocabulary, model, optimizer, best (the step and weights with the best full
validation), progress (a TrainingState), processes (each one's running totals and random state).
"""

import dataclasses
from dataclasses import dataclass, field

import torch

from run.checkpoint import CheckpointError
from run.totals import RunningTotals
from run.update import random_state
from support import files, machines
from support.seeds import mix_seeds


@dataclass
class TrainingState:
    """Counters, history and clocks of a run; checkpoints keep it under "progress"."""

    git: dict  # the code that made the run: see machines.git_state
    step: int = 0  # updates made
    evaluations: list[dict] = field(default_factory=list)  # the evaluation lines of metrics.jsonl, in order
    step_ms: list[float] = field(default_factory=list)  # of each log line
    train_mode: list[list[float]] = field(default_factory=list)  # [steps, loss, objective] since the last evaluation
    machine: dict | None = None  # machines.describe and the number of processes
    others: dict | None = None  # machines.OtherLoad, up to the last save
    resumed: int = 0  # times
    start: dict | None = None  # the weights of another run with which it started: see start.py
    stretches: list[dict] = field(default_factory=list)  # where it resumed with something changed: see straight.py
    metrics_bytes: int = 0  # length of metrics.jsonl at the last save
    wandb_id: str | None = None  # of the run at Weights & Biases, with which a resumed run goes on; None without one
    seconds: dict[str, float] = field(
        default_factory=lambda: {"train": 0.0, "eval": 0.0, "save": 0.0, "compile": 0.0, "total": 0.0}
    )

    @property
    def evaluated(self):
        """The step of the last evaluation, -1 before any."""
        return self.evaluations[-1]["step"] if self.evaluations else -1

    def take_train_mode(self):
        """Mean training loss and objective over the steps since the last evaluation, dropout included; None where
        there are none. The next call begins anew."""
        lines, self.train_mode = self.train_mode, []
        steps = sum(line[0] for line in lines)
        if not steps:
            return None
        loss, objective = (sum(line[0] * line[i] for line in lines) / steps for i in (1, 2))
        return {"loss": loss, "objective": objective}


def identity_of(config, dataset):
    """What saved weights belong to, as every checkpoint says it."""
    vocabulary = dataset.vocabulary.to_dict()
    return {"config": config.to_dict(), "dataset": dataset.describe(), "vocabulary": vocabulary}


def checkpoint_of(config, dataset, model, optimizer, state, best, totals, processes):
    """The content of ckpt.pt. All processes call this together."""
    return {
        **identity_of(config, dataset),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": best,  # {"step", "model"}
        "progress": dict(vars(state)),
        "processes": processes.all_gather({"interval": totals.to_dict(), "random": random_state()}),
    }


def restore(saved, model, optimizer, git):
    """Load a checkpoint into the model and the optimiser. -> its TrainingState; git: of the code that goes on"""
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = TrainingState(**saved["progress"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint does not fit its own config: {files.first_line(error)}") from error
    before = state.git
    are_clean = before["dirty"] is False and git["dirty"] is False
    is_clean = are_clean and machines.same_code(before["commit"], git["commit"])
    # A record names one commit: sessions of different code make it dirty.
    return dataclasses.replace(state, resumed=state.resumed + 1, git={"commit": git["commit"], "dirty": not is_clean})


def change_of_code(before, now):
    """Why no commit identifies the code of a resumed run any more; empty where one does, or none did before.
    before, now: the git of two TrainingStates."""
    if before["dirty"] is not False or now["dirty"] is False:
        return ""
    began, goes_on = ((git["commit"] or "unknown")[:8] for git in (before, now))
    return f"begun with the code of commit {began}, resumed with other code ({goes_on}, or changes not in a commit)"


def own_part(saved, config, processes, device):
    """(running totals, random state or None) with which this process goes on. The processes may be others than those
    that saved: then the first one takes over all totals, and the rest begin with nothing."""
    parts, rank = saved["processes"], processes.rank
    if len(parts) == processes.world_size:
        return RunningTotals.from_dict(parts[rank]["interval"], device), parts[rank]["random"]
    totals = RunningTotals.from_dict(parts[0]["interval"], device)
    if not processes.is_first:
        for value in totals.tensors():
            value.zero_()
        torch.manual_seed(mix_seeds(config.seed, rank, saved["progress"]["step"]))
        return totals, None
    for part in parts[1:]:
        theirs = RunningTotals.from_dict(part["interval"], device).tensors()
        for value, other in zip(totals.tensors(), theirs, strict=True):
            value += other
    return totals, parts[0]["random"]
