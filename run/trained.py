"""Load a run's weights as a model, for sample.py and analyze.py.

model, vocabulary, config = load_trained("out/run", "best.pt", "cpu")
"""

from pathlib import Path
from typing import NamedTuple

import torch

from data.common import DataError, Vocabulary
from model import GPT
from run import checkpoint
from run.checkpoint import CheckpointError
from run.settings import Config
from support import files
from support.options import ConfigError

CHECKPOINTS = {"best": "best.pt", "last": "ckpt.pt"}  # best: with the lowest validation loss


class Trained(NamedTuple):
    model: GPT  # in eval mode
    vocabulary: Vocabulary
    config: Config


def load_trained(out_dir, name, device) -> Trained:
    """The model in out_dir/name. ConfigError or CheckpointError if it is missing or does not fit its config."""
    return model_in(read_checkpoint(out_dir, name), Path(out_dir) / name, device)


def read_checkpoint(out_dir, name) -> dict:
    """The contents of the checkpoint out_dir/name."""
    folder = Path(out_dir)
    if not str(out_dir):
        raise ConfigError(["--out_dir=…: which run? It is the folder that train.py named at its end"])
    if not (folder / name).is_file():
        what = f"holds no {name}; is it the out_dir of a run?" if folder.is_dir() else "there is no such folder"
        raise CheckpointError(f"{folder}: {what}")
    saved = checkpoint.load(folder / name)
    missing = [key for key in ("config", "vocabulary", "model") if key not in saved]
    if missing:
        raise CheckpointError(f"{folder / name}: has no {', no '.join(missing)}; is it of another program?")
    return saved


def model_in(saved, path, device) -> Trained:
    """saved: the contents of the checkpoint at `path`."""
    config = Config.from_dict(saved["config"], origin=str(path))
    if problems := [f"{path}: {message}" for _, message in config.problems()]:
        raise ConfigError(problems)
    try:
        vocabulary = Vocabulary.from_dict(saved["vocabulary"])
        model = model_of(config, vocabulary, saved["model"])
    except (DataError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {files.first_line(error)}") from None
    return Trained(model.to(device).eval(), vocabulary, config)


def model_of(config, vocabulary, weights):
    """The model with these weights. RuntimeError if they do not fit; sizes are compared before memory is taken."""

    def misfit(reason):
        return RuntimeError(f"its weights do not fit its own config: {reason}")

    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise misfit("they are no tensors")
    held, rows = sum(weight.numel() for weight in weights.values()), (config.block_size, *config.expert_counts())
    if held < config.n_embd * max(rows):
        raise misfit(f"they are {held:,} numbers, fewer than n_embd = {config.n_embd} times {max(rows)}")
    try:
        with torch.device("meta"):
            empty = GPT(config, vocabulary.size)
    except (RuntimeError, TypeError) as error:  # beyond what 64 bits can count
        raise misfit(files.first_line(error)) from None
    expected, parameters = empty.state_dict(), dict(empty.named_parameters())
    for name in [*expected, *weights]:
        if name not in weights or name not in expected:
            raise misfit(f"{files.shown(name)} is {'missing' if name in expected else 'unknown'}")
        wanted, found = ((w.dtype, w.layout, tuple(w.shape)) for w in (expected[name], weights[name]))
        if found != wanted:
            raise misfit(f"{name} is {found}, expected {wanted}")
        is_of_router = ".router." in name and name not in parameters  # its own business: see state_problem
        if not is_of_router and not weights[name].isfinite().all():
            raise misfit(f"{name} has numbers that are not finite")
    model = GPT(config, vocabulary.size)
    model.load_state_dict(weights)
    for layer in model.moe_layers():
        if problem := layer.router.state_problem():
            raise misfit(f"the router of block {layer.router.layer}: {problem}")
    return model
