"""Write text with a trained model, character by character.

    python sample.py --out_dir=out/shakespeare_moe4-cpu-s1337
    python sample.py --out_dir=… --start="ROMEO:" --temperature=0.7 --max_new_tokens=300
    python sample.py --out_dir=… --start=FILE:prompt.txt --stop=$'\\n\\n'    up to the first empty line
    python sample.py --out_dir=… --show_experts --layer=2     coloured by the experts of block 2

Sample i has the seed --seed + i, and depends on that seed alone. With --show_experts, a character has the colour of the
expert with its largest gate; without a terminal, or with NO_COLOR set, expert numbers stand under the text. Past
block_size characters, the model goes on from the last half window (see `model.Decoder`).
"""

import functools
import os
import sys
import unicodedata
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from data.common import DataError
from run.trained import CHECKPOINTS, read_weights
from speed import decoding
from support import configurator, console, files, machines
from support.options import ConfigError, option
from support.palette import EXPERT_COLOURS

model_key, text_key, expert_key = (functools.partial(option, group=group) for group in ("Model", "Text", "Experts"))


@dataclass(frozen=True)
class SampleConfig:
    absent: ClassVar[dict[str, str]] = {
        "init_from": "leave it out, sample.py always loads the run in --out_dir; GPT-2's weights cannot be loaded",
        "compile": "leave it out, the fastest way to decode on this device is chosen without it",
        "backend": "leave it out, sample.py is a single process",
    }

    out_dir: str = model_key("", "the run to sample from", is_path=True)
    checkpoint: Literal["best", "last"] = model_key("best", "best.pt (lowest validation loss) or ckpt.pt")
    device: str = model_key("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = model_key("auto", "precision of matrix products")
    decoder: Literal["auto", "attention", "fused"] = model_key(
        "auto", "way of writing on CUDA: auto = what was measured to be fastest; see docs/speed.md"
    )
    start: str = text_key("", "prompt, or FILE:path; empty = a newline, else a space, else the first symbol")
    num_samples: int = text_key(1, "number of samples", at_least=1)
    max_new_tokens: int = text_key(500, "characters of each sample", at_least=1, at_most=10**7)
    stop: str = text_key("", "end a sample once its new characters end with this text; empty = never")
    temperature: float = text_key(
        0.8, "below 1 safer, above 1 wilder; 0 = always the most likely character", at_least=0
    )
    top_k: int = text_key(200, "sample among the k most likely characters; 0 = all", at_least=0)
    seed: int = text_key(
        1337, "seed of the first sample; the next one has the next seed", at_least=0, at_most=2**32 - 1
    )
    show_experts: bool = expert_key(False, "colour characters by their expert")
    layer: int = expert_key(-1, "the block whose experts are shown; -1 = the last with experts", at_least=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Writers: what the terminal shows


class PlainWriter:
    """Prints the text alone, as its tokens come. expert: of a token; None where not shown, or not read by the model."""

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
    """Prints each character on the colour of its expert; a coloured line feed would paint the rest of the row."""

    def show(self, character, expert):
        visible = "⏎" if character == "\n" else character
        end = "\n" if character == "\n" else ""
        print(visible if expert is None else coloured(visible, expert), end=end, flush=True)


class NumberWriter(PlainWriter):
    """Prints each line of text, and under it the last digit of each character's expert, or a dot without one."""

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


def make_writer(vocabulary, layer):
    if layer is None:
        return PlainWriter(vocabulary)
    has_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return (ColourWriter if has_colour else NumberWriter)(vocabulary)


def coloured(text, expert):
    red, green, blue = bytes.fromhex(EXPERT_COLOURS[expert % len(EXPERT_COLOURS)].removeprefix("#"))
    return f"\x1b[30;48;2;{red};{green};{blue}m{text}\x1b[0m"


def expert_legend(trained, layer, in_colour):
    """One line that names the block and its experts, in their colours if in_colour."""
    block = trained.moe_layers[layer]
    names = [f"expert {expert}" for expert in range(trained.of_block(block).n_expert)]
    entries = [coloured(f" {name} ", expert) for expert, name in enumerate(names)] if in_colour else names
    return f"block {block}: " + "  ".join(entries)


# ---------------------------------------------------------------------------------------------------------------------
# From options to text


def load_model(config, device):
    """(model in eval mode, its vocabulary, its Config). Raises ConfigError for a model that is not causal."""
    saved = read_weights(config.out_dir, CHECKPOINTS[config.checkpoint])
    model, trained = saved.model_on(device), saved.config
    if not trained.is_causal:
        leaks, causal = (", ".join(words) for words in (trained.leaks, trained.leaks.values()))
        reason = f"{leaks}: its experts depend on later characters or on other sequences"
        raise ConfigError([f"{config.out_dir} was trained with {reason}, so it cannot be sampled from; {causal} can"])
    return model, saved.vocabulary, trained


def prompt_ids(start, vocabulary):
    """The ids of the prompt that --start means.

    A byte-order mark, the CR of CR LF and a final line feed, which editors add, are left out where the vocabulary lacks
    them, and accents are taken in the form that it has. Raises DataError for other unknown symbols and for a file that
    is not UTF-8, OSError for an unreadable one.
    """
    if start.startswith("FILE:"):
        path = start.removeprefix("FILE:")
        try:
            start = files.read_whole(files.expanded(path)).decode()
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8 text") from None
    if not vocabulary.has("\ufeff"):
        start = start.removeprefix("\ufeff")
    if not vocabulary.has("\r"):
        start = start.replace("\r\n", "\n")
    if not vocabulary.has("\n"):
        start = start.removesuffix("\n")
    return vocabulary.encode(in_its_form(start, vocabulary)).tolist() or [vocabulary.start]


def in_its_form(text, vocabulary):
    """The text with its accents as the vocabulary has them: in one character with the letter (NFC), or in one of their
    own (NFD). They look alike, and which one is typed depends on the system. As it is where that changes nothing."""
    forms = (text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD")))
    return next((form for form in forms if vocabulary.has(form)), text)


def shown_layer(config, trained):
    """The index of --layer among the model's MoE layers; None when experts are not shown."""
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


def print_sample(decoder, prompt, stop, config, device, writer, layer, seed):
    """Write the prompt and its continuation. prompt: ids; stop: the ids after which it ends, or none.

    Writing stays one character behind the model, because a character's expert is known once the model has read it.
    """
    generator = torch.Generator().manual_seed(seed)
    unwritten, new = prompt, []
    # One step more than there are new characters, so that the model reads the last one too.
    for step in decoder.write(torch.tensor([prompt], device=device), config.max_new_tokens + 1, [generator]):
        experts = step.experts(layer)[0].tolist() if layer is not None else []
        experts = [None if expert < 0 else expert for expert in experts]
        # The model reads only the last characters: of a long prompt block_size, of a rebuilt cache half as many.
        known = [None] * (len(unwritten) - len(experts)) + experts[-len(unwritten) :]
        for token, expert in zip(unwritten, known):
            writer.write(token, expert)
        if stop and new[-len(stop) :] == stop:
            break
        unwritten = step.tokens.tolist()
        new += unwritten
    writer.close()


def main(argv):
    usage = "python sample.py --out_dir=… [--key=value …]"
    config = configurator.parse(SampleConfig, argv, usage=usage, description=__doc__)
    machine = machines.choose(config.device, config.dtype, compile=False)
    model, vocabulary, trained = load_model(config, machine.device)
    layer = shown_layer(config, trained)
    prompt, stop = (
        prompt_ids(config.start, vocabulary),
        vocabulary.encode(in_its_form(config.stop, vocabulary)).tolist(),
    )
    decoder = decoding.fastest(model, 1, machine, config.temperature, config.top_k or None, config.decoder)
    if config.decoder != "auto":
        print(f"decoder={config.decoder}: {decoder.how}", file=sys.stderr)
    for i in range(config.num_samples):
        if i:
            print("-" * 40)
        writer = make_writer(vocabulary, layer)
        if layer is not None:
            print(expert_legend(trained, layer, isinstance(writer, ColourWriter)))
        print_sample(decoder, prompt, stop, config, machine.device, writer, layer, config.seed + i)
    return 0


if __name__ == "__main__":
    console.run(main)
