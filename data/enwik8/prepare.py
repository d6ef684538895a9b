"""enwik8, one id a byte: the first 100,000,000 bytes of an English Wikipedia dump, 205 symbols, split 90M/5M/5M.

python data/enwik8/prepare.py                                                    # downloads 36 MB
python data/enwik8/prepare.py --source enwik8_head.gz --allow-partial --out DIR  # a part, under a name that says so
"""

import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent
sys.path.insert(0, str(HOME.parent.parent))  # first, so that `data` is ours and not an installed package

from data.build import TRAIN_VAL_TEST, Remote, TextSpec, main  # noqa: E402

ZIP_SHA256 = "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"

SPEC = TextSpec(
    name="enwik8",
    unit="byte",
    filenames=("enwik8", "enwik8_head"),
    splits=TRAIN_VAL_TEST,
    remotes=(
        Remote("https://mattmahoney.net/dc/enwik8.zip", ZIP_SHA256),
        # where https is in the way; the SHA-256 vouches for it
        Remote("http://mattmahoney.net/dc/enwik8.zip", ZIP_SHA256),
    ),
    size=100_000_000,
    sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    heads={
        1_024: "ef3e698d40b8b36d6d1776feccc25bab3d01de872a4fd8e56f5b929631568496",
        8_192: "b4a8bf3f56f0fcabc2a6d8fe6814c266ae9802db1ecd7cc2ae655c310f585d37",
        65_536: "05fc5f44993ef0557959db76bf47e45badb2dd9c69d93ce08911935b5e52bf40",
    },
)

if __name__ == "__main__":
    main(SPEC, HOME, sys.argv[1:], say=print)
