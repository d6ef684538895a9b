"""One spelling for what a person can write in several ways: titles, data sets, numbers of experts."""

import os
import re

from support.files import ROOT

PUBLISHED = {"shakespeare_char": "Shakespeare", "enwik8": "enwik8", "text8": "text8"}  # data sets, and in titles


def of_this_text(title: str, dataset: str, texts: list[str]) -> str:
    """The title of config files with this data set's name in the place of other texts': of the published ones, and of
    `texts`, the data sets that the files name."""
    name = os.path.basename(dataset.rstrip("/"))
    others = {os.path.basename(text.rstrip("/")) for text in (*PUBLISHED, *texts)} - {name, ""}
    names = sorted({*others, *(PUBLISHED[text] for text in others if text in PUBLISHED)}, key=len, reverse=True)
    found = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![^\W_])({found})(?![^\W_])", lambda _: name, title)


def one_list(numbers: str) -> str:
    """The value of n_expert_by_block without blanks and zeros in front; as it is where it is no list of numbers."""
    words = [word.strip() for word in numbers.split(",")]
    return ",".join(str(int(word)) for word in words) if all(re.fullmatch("[0-9]{1,5}", w) for w in words) else numbers


def one_spelling(dataset: str) -> str:
    """The name of a folder in data/, else its absolute path, however it was spelled; a folder must be there.

    Hashes are of the spelling, so that names, which committed records have, stay as they are.
    """
    if "/" not in dataset and os.sep not in dataset:
        return dataset
    path = os.path.expanduser(dataset)
    if not os.path.isdir(path):
        return dataset
    home = os.path.join(ROOT, "data")
    for folder in (os.path.abspath(path), os.path.realpath(path)):
        is_known = any(os.path.exists(os.path.join(folder, name)) for name in ("prepare.py", "train.bin"))
        if is_known and os.path.dirname(folder) in (home, os.path.realpath(home)):
            return os.path.basename(folder)
    return os.path.realpath(path)
