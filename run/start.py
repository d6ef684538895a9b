"""The weights with which a run starts, if not random ones, and those that --eval_only evaluates.

start = open_start(config, folder, saved)              # None: random weights, or those of the run that resumes
dataset = open_dataset(config, device, vocabulary_of(start, saved))    # in the ids that the weights know
start.load_into(model, config)
state.start = start.about                              # for the record
"""

import os
import re
from pathlib import Path

from data.common import Vocabulary
from run.checkpoint import CheckpointError
from run.settings import STARTS, Config
from run.trained import CHECKPOINTS, SavedWeights, read_weights, weights_in
from support.files import shown
from support.options import EXPERIMENT, ConfigError, nearest, options_of

GROUPS = ("Model", "Mixture of experts")  # of the keys that make the model
# Keys that change what weights mean, but not always their shapes. Weights do not say how many blocks share them.
NO_SHAPE = ("n_head", "expert_kind", "share_experts", "blocks_per_router", "router_ngram")
OF_MAPS = ("router", "router_table", "router_prior_table")  # the same, where the model has fixed maps
# Buffers with what the config says now. All else in a model's state was learned, drawn, or belongs to its router.
SCHEDULED = re.compile(r"aux_loss_coef|blocks\.\d+\.mlp\.(temperature|expert_dropout)")


class Start(SavedWeights):
    """Weights with which a run starts."""

    @property
    def about(self):
        """What a record keeps."""
        text = {"text": self.text["name"], "text_sha256": self.text["sha256"]}
        return {"run_id": self.config.run_id, "step": self.step, **text}

    def __str__(self):
        return f"{self.path} (step {self.step:,} of run {self.config.run_id}, trained on {self.text['name']})"

    def load_into(self, model, config):
        """Give the model these weights. A new run keeps the scheduled values of its own config; an evaluation takes
        those that were saved. CheckpointError where the model is another one."""
        own, weights = model.state_dict(), self.weights
        if not config.eval_only:
            weights = weights | {name: value for name, value in own.items() if SCHEDULED.fullmatch(name)}
        misfits = [name for name in {**own, **weights} if shape_of(own, name) != shape_of(weights, name)]
        differing = [row for row in config.differences(self.config, (EXPERIMENT,)) if row[0] in keys_of_model()]
        if not (misfits or config.eval_only):
            telling = NO_SHAPE + OF_MAPS if any(name.endswith("router.table") for name in own) else NO_SHAPE
            differing = [row for row in differing if row[0] in telling]
        if misfits or differing:
            told = [f"{key}={theirs!r} there, {ours!r} here" for key, ours, theirs in differing]
            told = told or [f"{misfits[0]} is {shape_of(weights, misfits[0])} there, {shape_of(own, misfits[0])} here"]
            raise CheckpointError(f"{self.path} is of another model: {'; '.join(told)}")
        model.load_state_dict(weights)


def shape_of(state, name):
    return tuple(state[name].shape) if name in state else None


def keys_of_model():
    options = options_of(Config).values()
    return {"block_size", *(option.name for option in options if option.group in GROUPS)}


def open_start(config, folder, saved) -> Start | None:
    """The weights that init_from names, of a run's folder (then its best) or in a file; with eval_only, also those of
    the run in out_dir. folder, saved: out_dir as a RunFolder, and the checkpoint in it that is to be resumed."""
    if saved:
        return Start(*weights_in(saved, folder / folder.read)) if config.eval_only else None
    if not config.names_a_run:
        return None
    path = Path(config.init_from)
    if not os.path.exists(config.init_from):  # which also takes names that are too long
        guess = None if "/" in config.init_from else nearest(config.init_from, STARTS)
        found = f"init_from is {shown(config.init_from)}, and there is no such folder or file"
        expected = f"expected {', '.join(STARTS)}, or the folder of another run"
        raise ConfigError([f"{found}; {expected}{f'; nearest: {guess}' if guess else ''}"])
    of_run, name = (path, CHECKPOINTS["best"]) if path.is_dir() else (path.parent, path.name)
    its_folder = of_run.parent if of_run.name == "snapshots" else of_run
    if not config.eval_only and folder.path.is_dir() and its_folder.is_dir() and folder.path.samefile(its_folder):
        raise ConfigError([f"init_from and out_dir are one folder, {folder}; choose another --out_dir for the new run"])
    return Start(*read_weights(of_run, name))


def vocabulary_of(start, saved):
    """The vocabulary of weights that are not trained on their run's text alone; None for the text's own."""
    if start:
        return start.vocabulary
    return Vocabulary.from_dict(saved["vocabulary"]) if saved and saved["progress"].get("start") else None
