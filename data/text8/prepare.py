"""text8, one id a character: 100,000,000 letters and spaces of cleaned Wikipedia, 27 symbols, split 90M/5M/5M.

python data/text8/prepare.py                                                   # downloads 31 MB
python data/text8/prepare.py --source text8_head.gz --allow-partial --out DIR  # a part, under a name that says so
"""

import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parent.parent))  # first, so that `data` is ours and not an installed package

from data.build import TRAIN_VAL_TEST, Remote, TextSpec, main  # noqa: E402

ZIP_SHA256 = "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"

SPEC = TextSpec(
    name="text8",
    unit="character",
    filenames=("text8", "text8_head"),
    splits=TRAIN_VAL_TEST,
    remotes=(
        Remote("https://mattmahoney.net/dc/text8.zip", ZIP_SHA256),
        # where https is in the way; the SHA-256 vouches for it
        Remote("http://mattmahoney.net/dc/text8.zip", ZIP_SHA256),
        Remote("https://github.com/piskvorky/gensim-data/releases/download/text8/text8.gz"),
    ),
    size=100_000_000,
    sha256="6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
    heads={
        1_024: "caf75ce07adc5564bf7e7f5d6b4c77f38cb6a78dd1543d39d234c9367ecbd01a",
        8_192: "029c52afa25a9c9340c063079c17ba2373262e4796e23c71fdd359e3ed4b7ae2",
        65_536: "28b8d3ca377976b77aeef1ae27ec72f62ee1756f92e79498a1cbbb06afa371b4",
    },
)

if __name__ == "__main__":
    main(SPEC, HOME, sys.argv[1:], say=print)
