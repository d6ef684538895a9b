"""Labels for each character of a text: its class, its place in the word, its speaker and so on.

    found = annotate(ids_N, vocabulary, dataset.symbol_counts("train"), context=config.block_size)
    found["speaker"].labels, found["speaker"].names

information.py compares them with the experts. Annotations in SYNTAX and CONTEXT are causal: they depend on the
character and those before it. Those in TOPIC are not: `JULIET:` is labelled Juliet from its J on. A symbol of the
vocabulary counts as a character; where it is a byte, a letter outside ASCII is several.

Shapes: N characters of the text; V vocabulary size. Needs no torch.
"""

import re
from typing import NamedTuple

import numpy as np

from analysis.information import dense
from data.characters import CLASSES, character_class

# Names of annotations. SYNTAX: a character's place in its word and line. CONTEXT: the characters before it. TOPIC: what
# the text is about at that place.
SYNTAX = ("class", "place in the word", "place in the line")
CONTEXT = ("previous character", "previous two", "previous three")
TOPIC = ("speaker", "play", "article", "passage")

BANDS = ("commonest quarter", "second quarter", "third quarter", "rarest quarter")
PLACES_IN_WORD = ("no letter", "first letter", "second letter", "third letter", "fourth letter", "fifth or later")
PLACES_IN_LINE = {0: "first of the line", 1: "2nd to 4th", 4: "5th to 16th", 16: "17th to 40th", 40: "41st or later"}
PASSAGES = 16
MOST_NAMES = 1000  # more names than anyone reads are left out

NAME_LINE = re.compile(r"(?:\A\n?|(?<=\n\n))([A-Z][^\n:]{0,39}):(?=\n)")
PARAGRAPH = re.compile(r"(?:\A\n?|(?<=\n\n))(?=[^\n])")
PAGE = re.compile(r"<page>(?:\s*<title>([^<\n]{0,200})</title>)?")

# tinyshakespeare's plays in its order, with their opening words, which are the only mark of a new play.
PLAYS = {
    "Coriolanus": "First Citizen:\nBefore we proceed any further, hear me speak.",
    "Richard III": "GLOUCESTER:\nNow is the winter of our discontent",
    "Richard II": "KING RICHARD II:\nOld John of Gaunt, time-honour'd Lancaster,",
    "Romeo and Juliet": "SAMPSON:\nGregory, o' my word, we'll not carry coals.",  # the file lacks the prologue
    "Henry VI, part 3": "WARWICK:\nI wonder how the king escaped our hands.",
    "The Winter's Tale": "ARCHIDAMUS:\nIf you shall chance, Camillo, to visit Bohemia,",
    "Measure for Measure": "DUKE VINCENTIO:\nEscalus.\n\nESCALUS:\nMy lord.",
    "The Taming of the Shrew": "SLY:\nI'll pheeze you, in faith.",
    "The Tempest": "Master:\nBoatswain!\n\nBoatswain:\nHere, master: what cheer?",
}


class Annotation(NamedTuple):
    labels: np.ndarray  # (N,) int64, >= 0
    names: list[str] | None  # the name of value i; None where there are more than MOST_NAMES


def annotate(ids_N, vocabulary, counts_V, context=None) -> dict[str, Annotation]:
    """{name: Annotation} of a text, without those that do not apply to it.

    ids_N      the text, ids of `vocabulary`
    counts_V   how often each symbol occurs in the training split, for frequency bands
    context    the model's block_size, where it read the text in windows of that length: characters in an earlier window
               were not seen and do not count; None: all of the text was seen

    - character, class, frequency band (`frequency_bands`): of the symbol itself.
    - place in the word: for letters, the number of letters before it in the word. A word is a run of ASCII letters,
      apostrophes that follow a letter, and symbols above 127.
    - place in the line: characters since the newline, in ranges. Left out where the text has no newline.
    - previous character, previous two, previous three: without the character itself; places with fewer characters
      before them have codes of their own.
    - speaker, play, article: where the text marks them (`speakers`, `plays`, `articles`), from each mark to the next.
    - passage: 16 equal stretches of the text, as a stand-in for topic where nothing is marked.
    """
    ids_N = np.asarray(ids_N, dtype=np.int64)
    classes_V, class_names = class_of(vocabulary)
    codes_V = np.array([symbol if isinstance(symbol, int) else ord(symbol) for symbol in vocabulary.symbols])
    codes_N = codes_V[ids_N]
    # One character for each symbol, so that positions agree; a byte becomes the character with its number.
    text = codes_N.astype("<u4").tobytes().decode("utf-32-le")
    found = {
        "character": Annotation(ids_N, _few([name_of(symbol) for symbol in vocabulary.symbols])),
        "class": Annotation(classes_V[ids_N], class_names),
        "frequency band": Annotation(frequency_bands(counts_V)[ids_N], list(BANDS)),
        "place in the word": Annotation(places_in_word(codes_N), list(PLACES_IN_WORD)),
        "place in the line": places_in_line(codes_N),
        **previous(ids_N, vocabulary, context),
        "speaker": speakers(text, vocabulary.unit),
        "play": plays(text),
        "article": articles(text, vocabulary.unit),
        "passage": passages(len(ids_N)),
    }
    return {name: annotation for name, annotation in found.items() if annotation}


def name_of(symbol: str | int) -> str:
    """A printable name of a symbol: itself, space, newline, tab, U+0301 or byte 0xC3."""
    character = chr(symbol) if isinstance(symbol, int) else symbol
    known = {" ": "space", "\n": "newline", "\t": "tab"}
    if character in known or (character.isascii() and character.isprintable()):
        return known.get(character, character)
    if isinstance(symbol, int):
        return f"byte 0x{symbol:02X}"
    return character if character.isalnum() else f"U+{ord(character):04X}"


# ---------------------------------------------------------------------------------------------------------------------
# Annotations of the symbol


def class_of(vocabulary) -> tuple[np.ndarray, list[str]]:
    """Each symbol's class (V,) int64, and the names of the classes."""
    classes = [CLASSES.index(character_class(symbol)) for symbol in vocabulary.symbols]
    return np.array(classes, dtype=np.int64), list(CLASSES)


def frequency_bands(counts_V) -> np.ndarray:
    """Each symbol's frequency band, an index into BANDS: (V,) int64.

    Sort the characters of the training text by symbol, the commonest first (of equals the smaller id first). A symbol
    belongs to the quarter that holds the middle of its stretch. So each band holds a quarter of the text to within half
    a symbol at either end; symbols that do not occur in training are in the last band.
    """
    counts_V = np.asarray(counts_V, dtype=np.int64)
    order = np.argsort(-counts_V, kind="stable")
    ends = np.cumsum(counts_V[order])
    twice_middles = 2 * ends - counts_V[order]
    bands_V = np.empty(len(counts_V), dtype=np.int64)
    bands_V[order] = np.where(counts_V[order] > 0, 2 * twice_middles // max(int(ends[-1]), 1), 3)
    return bands_V


# ---------------------------------------------------------------------------------------------------------------------
# Annotations of its place


def places_in_word(codes_N) -> np.ndarray:
    """Each character's place in its word, an index into PLACES_IN_WORD: (N,) int64.

    codes_N: code points or bytes. A word may begin at the start of the text.
    """
    lower_N = codes_N | 32  # of the capitals; nothing else becomes an ASCII letter
    letter_N = ((lower_N >= ord("a")) & (lower_N <= ord("z"))) | (codes_N > 127)
    in_word_N = letter_N.copy()
    in_word_N[1:] |= (codes_N[1:] == ord("'")) & letter_N[:-1]
    return np.minimum(_since(~in_word_N), len(PLACES_IN_WORD) - 1)


def places_in_line(codes_N) -> Annotation | None:
    """Each character's place in its line, in ranges; None where the text has no newline.

    The text begins with a new line, and a newline belongs to the line that it ends.
    """
    newline_N = codes_N == ord("\n")
    if not newline_N.any():
        return None
    before_N = np.concatenate(([0], _since(newline_N)[:-1]))
    labels_N = np.searchsorted(list(PLACES_IN_LINE), before_N, side="right") - 1
    return Annotation(labels_N, list(PLACES_IN_LINE.values()))


def _since(marks_N) -> np.ndarray:
    """The distance to the last mark, 0 at a mark; there is one before the text."""
    places_N = np.arange(len(marks_N))
    return places_N - np.maximum.accumulate(np.where(marks_N, places_N, -1))


def previous(ids_N, vocabulary, context) -> dict[str, Annotation]:
    """The annotations in CONTEXT: the one to three characters before each, within its window of `context`."""
    nothing = vocabulary.size  # an id of its own
    seen_N = np.arange(len(ids_N)) % (context or max(1, len(ids_N)))  # characters before it in its window
    found, codes_N = {}, np.zeros_like(ids_N)
    for n, name in enumerate(CONTEXT, start=1):
        nth_N = np.concatenate((np.full(n, nothing), ids_N))[: len(ids_N)]
        nth_N[seen_N < n] = nothing
        codes_N, count = dense(codes_N * (nothing + 1) + nth_N)
        found[name] = Annotation(codes_N, None)
        if n == 1:
            values = np.zeros(count, dtype=np.int64)
            values[codes_N] = nth_N
            names = [*map(name_of, vocabulary.symbols), "nothing"]
            found[name] = Annotation(codes_N, _few([names[value] for value in values]))
    return found


def passages(length) -> Annotation:
    return Annotation(np.arange(length) * PASSAGES // max(1, length), [f"passage {i + 1}" for i in range(PASSAGES)])


# ---------------------------------------------------------------------------------------------------------------------
# Annotations of the topic


def speakers(text, unit) -> Annotation | None:
    """The speaker in a play, from lines with `Name:` alone after a blank line or at the text's start.

    None where there are fewer than 2 speakers, or where the paragraphs with such a line are less than half of the text,
    for prose has a few of them too. The same name in two plays is one speaker.
    """
    marks = [(match.start(1), match[1]) for match in NAME_LINE.finditer(text)]
    names = sorted({name for _, name in marks})
    starts = [match.end() for match in PARAGRAPH.finditer(text)]
    sizes = dict(zip(starts, np.diff([*starts, len(text)]).tolist()))
    if len(names) < 2 or 2 * sum(sizes[start] for start, _ in marks) < len(text):
        return None
    values = [(start, names.index(name)) for start, name in marks]
    names = [_readable(name, unit) for name in names]
    return _until_next(values, names, "before the first speaker", len(text))


def plays(text) -> Annotation | None:
    """The play, by the opening words in PLAYS; None where there are fewer than 2.

    Text before the first opening belongs to the play before it in the table.
    """
    names = list(PLAYS)
    marks = sorted((text.find(words), names.index(name)) for name, words in PLAYS.items() if words in text)
    if marks and marks[0][0] > 0 and marks[0][1] > 0:
        marks.insert(0, (0, marks[0][1] - 1))
    return _until_next(marks, names, "before the first play", len(text)) if len(marks) > 1 else None


def articles(text, unit) -> Annotation | None:
    """The article of a Wikipedia dump, each from its `<page>` on; None where there are fewer than 2."""
    found = list(PAGE.finditer(text))
    if len(found) < 2:
        return None
    names = [_readable(match[1], unit) if match[1] else f"article {i + 1}" for i, match in enumerate(found)]
    return _until_next(
        [(match.start(), i) for i, match in enumerate(found)], names, "before the first article", len(text)
    )


def _until_next(marks, names, before, length) -> Annotation:
    """Each mark (place, value) holds until the next one; `before` names the text before the first mark, if any."""
    if marks[0][0] > 0:
        marks, names = [(0, len(names)), *marks], [*names, before]
    places, values = np.array(marks).T
    labels_N = np.repeat(values, np.diff([*places, length]))
    return Annotation(labels_N, _few(names))


def _few(names) -> list[str] | None:
    return names if len(names) <= MOST_NAMES else None


def _readable(name, unit) -> str:
    """A name found in the text, decoded from UTF-8 where the text is of bytes."""
    return name.encode("latin-1").decode("utf-8", errors="replace") if unit == "byte" else name
