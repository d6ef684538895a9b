"""A trained run that is analysed: its weights, and the text on which they are measured.

    run = AnalysedRun("out/shakespeare_moe4-cpu-s1337", options, machine)
    run.model, run.windows, run.annotations["speaker"]

Shapes: N characters of the text; V vocabulary size.
"""

import numpy as np

from analysis.annotation import annotate
from data.characters import CLASSES
from data.common import Dataset, find_dataset
from model import IGNORED
from run import run_folder
from run.checkpoint import CheckpointError
from run.straight import is_straight
from run.trained import CHECKPOINTS, read_weights
from support.seeds import mix_seeds

# Batches of an analysis come from another stream than those of training and of evaluation with the same seed.
ANALYSIS_STREAM = 2**33


class AnalysedRun:
    """A run's weights and the start of its validation split.

    folder   a run's out_dir, a Path
    options  analyze.py's: checkpoint, characters, pass_characters, seed

    Raises CheckpointError or DataError where the run or its text cannot be read, or do not belong together.
    """

    def __init__(self, folder, options, machine):
        self.folder, self.machine, self.checkpoint = folder, machine, CHECKPOINTS[options.checkpoint]
        saved = read_weights(folder, self.checkpoint)
        self.step, self.vocabulary, self.config = saved.step, saved.vocabulary, saved.config
        self.model = saved.model_on(machine.device)
        self.model.set_step(self.step)
        has_history = "evaluations" in saved.state  # best.pt has none
        self.is_straight = is_straight(self.config, saved.state) if has_history else None
        self.seed = mix_seeds(options.seed, self.config.seed) % 2**31  # runs of other seeds draw other controls
        dataset = Dataset.open(find_dataset(self.config.dataset), machine.device)
        dataset = dataset.train_on_first(self.config.train_characters)
        if dataset.source_sha256 == saved.text.get("sha256"):
            dataset = dataset.in_vocabulary(self.vocabulary)  # that of other weights, if it started with them
        self.dataset = dataset
        if saved.text != dataset.describe() or saved.vocabulary != dataset.vocabulary:
            differing = run_folder.texts(saved.text, dataset.describe())
            raise CheckpointError(
                f"{folder} was trained on another text than {self.config.dataset} is now: {differing}"
            )
        windows = list(dataset.windows("val", self.config.block_size, self.config.batch_size))
        self.windows = self._first(windows, options.characters)  # [(x, y)], (B, T) each
        self.pass_windows = self._first(self.windows, options.pass_characters)  # for what reads them many times
        self.is_whole = len(self.windows) == len(windows)
        self.ids_N = np.concatenate([x[y != IGNORED].cpu().numpy() for x, y in self.windows])
        self.counts_V = dataset.symbol_counts("train")
        self.annotations = annotate(self.ids_N, self.vocabulary, self.counts_V, self.config.block_size)

    @property
    def classes(self):
        """(each character's class (N,), the names of the classes)"""
        return self.annotations["class"], CLASSES

    def training_batches(self, count):
        """Batches drawn as for training, but none that training has drawn."""
        config = self.config
        return [
            self.dataset.batch("train", config.seed + ANALYSIS_STREAM, i, config.batch_size, config.block_size)
            for i in range(count)
        ]

    def _first(self, windows, characters):
        """As many batches of windows as `characters` fill, at least one; 0: all."""
        count = characters // (self.config.batch_size * self.config.block_size)
        return windows[: max(1, count)] if characters else windows
