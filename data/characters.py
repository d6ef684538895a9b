"""The class of a character: vowel, digit, space and so on. Needs no torch."""

CLASSES = ("vowel", "consonant", "capital", "digit", "space", "newline", "punctuation", "other")


def character_class(symbol: str | int) -> str:
    """One of CLASSES for a character, or a byte given as a number; bytes above 127 are "other"."""
    character = chr(symbol) if isinstance(symbol, int) else symbol
    if not character.isascii():
        return "other"
    if character.isupper():
        return "capital"
    if character.isalpha():
        return "vowel" if character in "aeiou" else "consonant"
    if character.isdigit():
        return "digit"
    blank = {"\n": "newline", " ": "space"}
    return blank.get(character) or ("punctuation" if character.isprintable() else "other")
