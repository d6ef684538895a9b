"""Text from a trained model, streamed as it is made.

    python sample.py --out_dir=out/shakespeare_moe4-cpu-s1337
    python sample.py --out_dir=… --start="ROMEO:" --temperature=0.7 --max_new_tokens=300
    python sample.py --out_dir=… --start=FILE:prompt.txt
    python sample.py --out_dir=… --show_experts --layer=2     coloured by the experts of block 2

The first --seed gives the first sample, the next seed the second, and so on: a sample depends on its own seed alone.
A character's colour is the expert with its largest gate; where colours cannot be shown (no terminal, or NO_COLOR is
set), expert numbers stand under the text. Past block_size, the model goes on from the last half window (see
`model.Decoder`).
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from data.common import DataError
from run.trained import CHECKPOINTS, load
from speed import decoding
from support import configurator, console, files, machines
from support.files import FileError
from support.options import ConfigError, option
from support.palette import EXPERT_COLOURS


@dataclass(frozen=True)
class SampleConfig:
    out_dir: str = option("", "the run to sample from", group="Model")
    checkpoint: Literal["best", "last"] = option("best", "best.pt (lowest validation loss) or ckpt.pt", group="Model")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", group="Model")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "precision of matrix products", group="Model")
    start: str = option(
        "", "prompt, or FILE:path; empty = a newline, or a space where the vocabulary has none", group="Text"
    )
    num_samples: int = option(1, "how many", group="Text", at_least=1)
    max_new_tokens: int = option(500, "characters of each", group="Text", at_least=1, at_most=10**7)
    temperature: float = option(
        0.8, "below 1 safer, above 1 wilder; 0 = always the most likely character", group="Text", at_least=0
    )
    top_k: int = option(200, "sample among the k most likely characters; 0 = all", group="Text", at_least=0)
    seed: int = option(
        1337, "of the first sample; each next one takes the next", group="Text", at_least=0, at_most=2**32 - 1
    )
    show_experts: bool = option(False, "colour characters by their expert", group="Experts")
    layer: int = option(
        -1, "the block whose experts are shown; -1 = the last with experts", group="Experts", at_least=-1
    )


class PlainWriter:
    """Characters as they come. Each token may come with its expert, or None for one that the model has not read."""

    def __init__(self, vocabulary):
        self.decode = vocabulary.decoder()

    def write(self, token, expert):
        for character in self.decode([token]):
            self.show(character, expert)

    def close(self):
        for character in self.decode([], final=True):
            self.show(character, None)
        self.end()

    def show(self, character, expert):
        print(character, end="", flush=True)

    def end(self):
        print(flush=True)


class ColourWriter(PlainWriter):
    """Each character on the colour of its expert; a newline shows as ⏎, for a coloured line feed would paint the rest
    of the row."""

    def show(self, character, expert):
        visible = "⏎" if character == "\n" else character
        print(
            visible if expert is None else coloured(visible, expert), end="\n" if character == "\n" else "", flush=True
        )


class NumberWriter(PlainWriter):
    """Each line of text, and under it the last digit of every character's expert (a dot where it has none)."""

    def __init__(self, vocabulary):
        super().__init__(vocabulary)
        self.text, self.numbers = "", ""

    def show(self, character, expert):
        self.text += "⏎" if character == "\n" else character
        self.numbers += "." if expert is None else str(expert % 10)
        if character == "\n":
            self.end()

    def end(self):
        if self.text:
            print(f"{self.text}\n{self.numbers}", flush=True)
        self.text, self.numbers = "", ""


def coloured(text, expert):
    red, green, blue = bytes.fromhex(EXPERT_COLOURS[expert % len(EXPERT_COLOURS)].removeprefix("#"))
    return f"\x1b[30;48;2;{red};{green};{blue}m{text}\x1b[0m"


def load_model(config, device):
    """-> (model in eval mode, its vocabulary, its Config)"""
    model, vocabulary, trained = load(config.out_dir, CHECKPOINTS[config.checkpoint], device)
    if not trained.is_causal:
        leaks, twins = (", ".join(words) for words in (trained.leaks, trained.leaks.values()))
        reason = f"{leaks}: its experts depend on later characters or on other sequences"
        raise ConfigError([f"{config.out_dir} was trained with {reason}, so it cannot be sampled from; {twins} can"])
    return model, vocabulary, trained


def prompt_text(start, vocabulary):
    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        try:
            start = files.read_whole(path).decode().replace("\r\n", "\n")
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8 text") from None
    if start:
        return start
    newline = "\n" if vocabulary.unit == "character" else ord("\n")
    return "\n" if newline in vocabulary.symbols else " "


def shown_layer(config, trained):
    """Which of the MoE layers --layer means, or None when experts are not shown."""
    if not config.show_experts:
        return None
    blocks = trained.moe_layers
    if not blocks:
        raise ConfigError([f"--show_experts: {config.out_dir} is a dense model, it has no experts"])
    if config.layer == -1:
        return len(blocks) - 1
    if config.layer not in blocks:
        raise ConfigError([f"--layer={config.layer}: experts are in block {', '.join(map(str, blocks))}"])
    return blocks.index(config.layer)


def make_writer(vocabulary, layer, trained):
    if layer is None:
        return PlainWriter(vocabulary)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        return ColourWriter(vocabulary)
    return NumberWriter(vocabulary)


def legend(trained, layer, in_colour):
    names = [f"expert {expert}" for expert in range(trained.of_block(trained.moe_layers[layer]).n_expert)]
    entries = [coloured(f" {name} ", expert) for expert, name in enumerate(names)] if in_colour else names
    return f"block {trained.moe_layers[layer]}: " + "  ".join(entries)


def write_sample(decoder, prompt, config, device, writer, layer, seed):
    """Prompt and continuation. A character's expert is known once the model has read it, so writing stays one
    character behind."""
    generator = torch.Generator().manual_seed(seed)
    unwritten = prompt
    # One step more than there are characters to write: the last character must be read, too.
    for step in decoder.write(torch.tensor([prompt], device=device), config.max_new_tokens + 1, [generator]):
        experts = step.experts(layer)[0].tolist() if layer is not None else []
        experts = [None if expert < 0 else expert for expert in experts]
        # A long prompt is cut to the last block_size characters, and a cache is rebuilt from half of it: experts belong
        # to the end.
        known = [None] * (len(unwritten) - len(experts)) + experts[-len(unwritten) :]
        for token, expert in zip(unwritten, known):
            writer.write(token, expert)
        unwritten = step.tokens.tolist()
    writer.close()


def main(argv):
    config = configurator.parse(
        SampleConfig, argv, usage="python sample.py --out_dir=… [--key=value …]", description=__doc__
    )
    machine = machines.choose(config.device, config.dtype, compile=False)
    model, vocabulary, trained = load_model(config, machine.device)
    layer = shown_layer(config, trained)
    prompt = vocabulary.encode(prompt_text(config.start, vocabulary)).tolist()
    decoder = decoding.fastest(model, 1, machine, config.temperature, config.top_k or None)
    for i in range(config.num_samples):
        if i:
            print("-" * 40)
        writer = make_writer(vocabulary, layer, trained)
        if layer is not None:
            print(legend(trained, layer, isinstance(writer, ColourWriter)))
        write_sample(decoder, prompt, config, machine.device, writer, layer, config.seed + i)
    return 0


if __name__ == "__main__":
    console.run(main, (ConfigError, DataError, FileError))
