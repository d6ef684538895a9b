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
    return model_in(read_weights(out_dir, name), Path(out_dir) / name, device)


def read_weights(out_dir, name) -> dict:
    """The contents of the checkpoint out_dir/name."""
    folder = Path(out_dir)
    if not str(out_dir):
        raise ConfigError(["--out_dir=…: which run? It is the folder that train.py named at its end"])
    if not (folder / name).is_file():
        what = f"holds no {name}; is it the out_dir of a run?" if folder.is_dir() else "there is no such folder"
        what = "is a file; expected the folder of a run" if folder.is_file() else what
        raise CheckpointError(f"{folder}: {what}")
    saved = checkpoint.load(folder / name)
    missing = [key for key in ("config", "vocabulary", "model") if key not in saved]
    if missing:
        raise CheckpointError(f"{folder / name}: has no {', no '.join(missing)}; is it of another program?")
    return saved


def model_in(saved, path, device) -> Trained:
    """saved: the contents of the checkpoint at `path`. CheckpointError where they do not fit together."""
    config = Config.from_dict(saved["config"], origin=str(path))
    if problems := [f"{path}: {message}" for _, message in config.problems()]:
        raise ConfigError(problems)
    try:
        vocabulary = Vocabulary.from_dict(saved["vocabulary"])
        model = model_of(config, vocabulary, saved["model"])
    except DataError as error:
        raise CheckpointError(f"{path}: {files.first_line(error)}") from None
    except (RuntimeError, TypeError) as error:
        why = " ".join(line.strip() for line in str(error).splitlines()[:2])  # the headline, and the first misfit
        raise CheckpointError(f"{path}: its weights do not fit its own config: {why}") from None
    return Trained(model.to(device).eval(), vocabulary, config)


def model_of(config, vocabulary, weights):
    """The model with these weights. RuntimeError or TypeError where they do not fit it."""
    blocks = {str(name).split(".")[1] for name in weights if str(name).startswith("blocks.")}
    if len(blocks) != config.n_layer:  # to build a thousand blocks takes seconds, even without memory
        raise RuntimeError(f"it has {len(blocks)} blocks, and n_layer is {config.n_layer}")
    with torch.device("meta"):  # compare sizes before memory is taken for a model of the config's size
        GPT(config, vocabulary.size).load_state_dict(weights, assign=True)
    if broken := [name for name, weight in weights.items() if weight.is_floating_point() and weight.isnan().any()]:
        raise RuntimeError(f"{broken[0]} is NaN somewhere")
    model = GPT(config, vocabulary.size)
    model.load_state_dict(weights)
    for layer in model.moe_layers():
        if problem := layer.router.state_problem():
            raise RuntimeError(f"the router of block {layer.router.layer}: {problem}")
    return model
