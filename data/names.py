"""Names of data sets: which are kept for published texts, and how they stand in titles and configs. Needs no torch."""

import os
import re

from support.files import ROOT

PUBLISHED = {"shakespeare_char": "Shakespeare", "enwik8": "enwik8", "text8": "text8"}  # data sets, and in titles
# Also what older versions called a changed text: shakespeare_char-altered-8K.
KEPT = re.compile(r"(shakespeare_char|enwik8|text8).*|.*-(head|altered)-[0-9.]+[KM]?", re.DOTALL)


def is_kept(name: str) -> bool:
    """Whether a text of this name is, or claims to be, a published text or a part of one."""
    return KEPT.fullmatch(name) is not None


def of_this_text(title: str, dataset: str, texts: list[str]) -> str:
    """The title of config files with this data set's name in the place of other texts': of the published ones, and of
    `texts`, the data sets that the files name."""
    name = os.path.basename(dataset.rstrip("/"))
    others = {os.path.basename(text.rstrip("/")) for text in (*PUBLISHED, *texts)} - {name, ""}
    names = sorted({*others, *(PUBLISHED[text] for text in others if text in PUBLISHED)}, key=len, reverse=True)
    found = "|".join(map(re.escape, names))
    return re.sub(rf"(?<![^\W_])({found})(?![^\W_])", lambda _: name, title)


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
