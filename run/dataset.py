"""The data set of a run: prepared where it is missing, and long enough for the config.

if processes.is_first:
    prepare(config, say=print)
dataset = open_dataset(config, device)
"""

import os
import subprocess
import sys

from data.common import DataError, Dataset, find_dataset, is_prepared
from support.files import ROOT


def prepare(config, say):
    """Make the data set's bins where they are missing and config.prepare allows it. DataError where that fails."""
    folder = find_dataset(config.dataset)
    script = folder / "prepare.py"
    # Only a script of ours is run unasked. Bins without a meta.json are somebody else's: opening them reports that.
    is_ours = folder.parent == ROOT / "data" and script.exists()
    if not is_ours or is_prepared(folder):
        return
    shown = os.path.relpath(script)
    if not config.prepare:
        raise DataError(f"{config.dataset} is not prepared, and --prepare=False forbids to do it now: python {shown}")
    say(f"{config.dataset} is not prepared yet: running python {shown}", flush=True)
    if subprocess.run([sys.executable, str(script)]).returncode != 0:
        raise DataError(f"{config.dataset} could not be prepared (the reason is above)")


def open_dataset(config, device, vocabulary=None):
    """The prepared data set, in the ids of a model's vocabulary if one is given. DataError where that lacks symbols of
    the text, or where a split is shorter than a block."""
    dataset = Dataset.open(find_dataset(config.dataset), device).train_on_first(config.train_characters)
    if vocabulary is not None:
        dataset = dataset.in_vocabulary(vocabulary)
    for split in ("train", "val"):
        size = dataset.sizes[split]
        if size <= config.block_size:
            raise DataError(
                f"the {split} split of {dataset.name} has {size:,} {dataset.unit}s: too few for "
                f"block_size={config.block_size}; choose --block_size={size - 1} or less, or a longer text"
            )
    return dataset
