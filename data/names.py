"""Which names of data sets are kept for published texts and their parts. Needs no torch."""

import re

# Also what older versions called a changed text: shakespeare_char-altered-8K.
KEPT = re.compile(r"(shakespeare_char|enwik8|text8).*|.*-(head|altered)-[0-9.]+[KM]?", re.DOTALL)


def is_kept(name: str) -> bool:
    """Whether a text of this name is, or claims to be, a published text or a part of one."""
    return KEPT.fullmatch(name) is not None
