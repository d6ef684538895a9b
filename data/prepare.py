"""Prepare a text of your own for training.

python data/prepare.py my.txt --name=mine                              # characters of UTF-8 text, into data/mine
python data/prepare.py my.txt --name=mine --unit=byte --splits=90,5,5  # bytes of any file, with a test split
python train.py config/shakespeare_moe4.py config/cpu.py --dataset=mine
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # first, so that `data` is ours

from data.build import TRAIN_VAL, Say, TextSpec, prepare_dataset, run_script  # noqa: E402
from data.common import BYTE, CHARACTER, SPLITS, DataError, here  # noqa: E402
from data.names import is_kept  # noqa: E402
from support.files import ROOT, shown  # noqa: E402
from support.schema import FITS, LINE  # noqa: E402


def main(arguments: list[str], say: Say) -> None:
    """Prepare a text of one's own as the command line asks; a mistake is one message and exit status 2."""
    parser = argparse.ArgumentParser(prog="python data/prepare.py", description="Prepare a text of your own.")
    text = "the text: a file, a .gz or .zip, a folder with one of them, or an address"
    name = "of the data set, for train.py --dataset: a folder in data/, or (with a / in it) the path of a folder"
    unit = "what one id stands for: a character of UTF-8 text (the default), or a byte of any file"
    splits = "percent for training and validation, or training, validation and test (default: 90,10)"
    parser.add_argument("text", metavar="TEXT", help=text)
    parser.add_argument("--name", required=True, help=name)
    parser.add_argument("--unit", choices=(CHARACTER, BYTE), default=CHARACTER, help=unit)
    parser.add_argument("--splits", metavar="PERCENTS", default=",".join(map(str, TRAIN_VAL.values())), help=splits)
    options = parser.parse_args(arguments)

    def prepare() -> tuple[dict, Path]:
        folder = own_folder(options.name)
        spec = TextSpec(folder.name, options.unit, filenames=("input.txt",), splits=percents(options.splits))
        return prepare_dataset(spec, None, folder, options.text, say=say), folder

    run_script(parser, prepare, say)
    train, configs = (
        here(ROOT / "train.py"),
        [here(ROOT / "config" / name) for name in ("shakespeare_moe4.py", "cpu.py")],
    )
    say(f"train on it: {shlex.join(['python', train, *configs, f'--dataset={options.name}'])}")


def own_folder(name: str) -> Path:
    """The folder of a data set's name. Raises DataError for one that is not for a text of one's own."""
    is_path = os.sep in name or "/" in name
    folder = Path(os.path.abspath(os.path.expanduser(name) if is_path else ROOT / "data" / name))
    if name in ("", ".", "..") or folder.name == "" or not FITS[LINE](folder.name):
        raise DataError(f"--name {shown(name)}: not a name that tables can show; choose one like mine")
    if (folder / "prepare.py").exists():
        raise DataError(f"--name {shown(name)}: {folder} has a prepare.py of its own; choose another name")
    if is_kept(folder.name):
        raise DataError(f"--name {shown(name)}: kept for a published text and its parts; choose another name")
    return folder


def percents(text: str) -> dict[str, int]:
    """Percent of the text for each split, from "90,10" or "90,5,5"."""
    parts = text.split(",")
    values = [int(part) for part in parts if part.strip().isdecimal()]
    if len(values) != len(parts) or len(values) not in (2, 3) or 0 in values or sum(values) != 100:
        expected = "expected two or three whole numbers from 1 that add up to 100, as 90,10 or 90,5,5"
        raise DataError(f"--splits {shown(text)}: {expected}")
    return dict(zip(SPLITS, values))


if __name__ == "__main__":
    main(sys.argv[1:], say=print)
