"""Read a run's weights, and load them as a model for sample.py and analyze.py.

saved = read_weights("out/run", "best.pt")
model = saved.model_on("cpu")
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


class SavedWeights(NamedTuple):
    """The weights in a checkpoint, and what they were trained on."""

    path: Path
    config: Config
    vocabulary: Vocabulary
    text: dict  # see Dataset.describe
    weights: dict  # of the model, by name
    state: dict  # with "step"; that of ckpt.pt is a TrainingState

    @property
    def step(self):
        return self.state["step"]

    def model_on(self, device) -> GPT:
        """The model with these weights, in eval mode. CheckpointError where they do not fit their config."""
        try:
            model = model_of(self.config, self.vocabulary, self.weights)
        except (RuntimeError, TypeError) as error:
            why = " ".join(line.strip() for line in str(error).splitlines()[:2])  # the headline, and the first misfit
            raise CheckpointError(f"{self.path}: its weights do not fit its own config: {why}") from None
        return model.to(device).eval()


def read_weights(out_dir, name) -> SavedWeights:
    """The weights in out_dir/name. ConfigError or CheckpointError if they are missing or cannot be those of a run."""
    folder = Path(out_dir)
    if not str(out_dir):
        raise ConfigError(["--out_dir=…: which run? It is the folder that train.py named at its end"])
    if not (folder / name).is_file():
        what = f"holds no {name}; is it the out_dir of a run?" if folder.is_dir() else "there is no such folder"
        what = "is a file; expected the folder of a run" if folder.is_file() else what
        raise CheckpointError(f"{folder}: {what}")
    return weights_in(checkpoint.load(folder / name), folder / name)


def weights_in(saved, path) -> SavedWeights:
    """saved: the content of the checkpoint at `path`."""
    state = saved.get("progress", saved)  # ckpt.pt keeps its step there
    missing = [key for key in ("config", "vocabulary", "dataset", "model") if key not in saved]
    if missing := [*missing, *(["step"] if "step" not in state else [])]:
        raise CheckpointError(f"{path}: has no {', no '.join(missing)}; is it of another program?")
    config = Config.from_dict(saved["config"], origin=str(path))
    if problems := [f"{path}: {message}" for _, message in config.problems()]:
        raise ConfigError(problems)
    try:
        vocabulary = Vocabulary.from_dict(saved["vocabulary"])
    except DataError as error:
        raise CheckpointError(f"{path}: {files.first_line(error)}") from None
    return SavedWeights(path, config, vocabulary, saved["dataset"], saved["model"], state)


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
