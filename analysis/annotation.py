"""Labels for each character of a text: its class, its place in the word, its speaker and so on.

    found = annotate(ids_N, vocabulary, dataset.symbol_counts("train"), context=config.block_size)
    found["speaker"]        # (N,) int64 >= 0: a number for each speaker

information.py compares them with the experts. Annotations in SYNTAX and CONTEXT are causal: they depend on the
character and those before it. Those in TOPIC are not: `JULIET:` is labelled Juliet from its J on. A symbol of the
vocabulary counts as a character; where it is a byte, a letter outside ASCII is several.

Shapes: N characters of the text; V vocabulary size. Needs no torch.
"""

import re

import numpy as np

from analysis.information import dense
from data.characters import CLASSES, character_class

# Names of annotations. SYNTAX: a character's place in its word and line. CONTEXT: the characters before it. TOPIC: what
# the text is about at that place.
SYNTAX = ("class", "place in the word", "place in the line")
CONTEXT = ("previous character", "previous two", "previous three")
TOPIC = ("speaker", "play", "article", "passage")

LAST_PLACE_IN_WORD = 5  # the fifth letter or later; 0 is no letter
PLACES_IN_LINE = (0, 1, 4, 16, 40)  # characters since the newline at which each range begins
PASSAGES = 16

NAME_LINE = re.compile(r"(?:\A\n?|(?<=\n\n))([A-Z][^\n:]{0,39}):(?=\n)")
PARAGRAPH = re.compile(r"(?:\A\n?|(?<=\n\n))(?=[^\n])")

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


def annotate(ids_N, vocabulary, counts_V, context=None) -> dict[str, np.ndarray]:
    """{name: labels (N,)} of a text, without the annotations that do not apply to it.

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
    codes_V = np.array([symbol if isinstance(symbol, int) else ord(symbol) for symbol in vocabulary.symbols])
    codes_N = codes_V[ids_N]
    # One character for each symbol, so that positions agree; a byte becomes the character with its number.
    text = codes_N.astype("<u4").tobytes().decode("utf-32-le")
    found = {
        "character": ids_N,
        "class": class_of(vocabulary)[ids_N],
        "frequency band": frequency_bands(counts_V)[ids_N],
        "place in the word": places_in_word(codes_N),
        "place in the line": places_in_line(codes_N),
        **previous(ids_N, vocabulary, context),
        "speaker": speakers(text),
        "play": plays(text),
        "article": articles(text),
        "passage": np.arange(len(ids_N)) * PASSAGES // max(1, len(ids_N)),
    }
    return {name: labels_N for name, labels_N in found.items() if labels_N is not None}


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


def class_of(vocabulary) -> np.ndarray:
    """Each symbol's class, an index into CLASSES: (V,) int64."""
    return np.array([CLASSES.index(character_class(symbol)) for symbol in vocabulary.symbols], dtype=np.int64)


def frequency_bands(counts_V) -> np.ndarray:
    """Each symbol's frequency band, 0 (the commonest quarter) to 3: (V,) int64.

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
    """Each character's place in its word, the number of the letter, at most LAST_PLACE_IN_WORD.

    codes_N: code points or bytes. A word may begin at the start of the text.
    """
    lower_N = codes_N | 32  # of the capitals; nothing else becomes an ASCII letter
    letter_N = ((lower_N >= ord("a")) & (lower_N <= ord("z"))) | (codes_N > 127)
    in_word_N = letter_N.copy()
    in_word_N[1:] |= (codes_N[1:] == ord("'")) & letter_N[:-1]
    return np.minimum(_since(~in_word_N), LAST_PLACE_IN_WORD)


def places_in_line(codes_N) -> np.ndarray | None:
    """Each character's place in its line, in ranges; None where the text has no newline.

    The text begins with a new line, and a newline belongs to the line that it ends.
    """
    newline_N = codes_N == ord("\n")
    if not newline_N.any():
        return None
    before_N = np.concatenate(([0], _since(newline_N)[:-1]))
    return np.searchsorted(PLACES_IN_LINE, before_N, side="right") - 1


def _since(marks_N) -> np.ndarray:
    """The distance to the last mark, 0 at a mark; there is one before the text."""
    places_N = np.arange(len(marks_N))
    return places_N - np.maximum.accumulate(np.where(marks_N, places_N, -1))


def previous(ids_N, vocabulary, context) -> dict[str, np.ndarray]:
    """The annotations in CONTEXT: the one to three characters before each, within its window of `context`."""
    nothing = vocabulary.size  # an id of its own
    seen_N = np.arange(len(ids_N)) % (context or max(1, len(ids_N)))  # characters before it in its window
    found, codes_N = {}, np.zeros_like(ids_N)
    for n, name in enumerate(CONTEXT, start=1):
        nth_N = np.concatenate((np.full(n, nothing), ids_N))[: len(ids_N)]
        nth_N[seen_N < n] = nothing
        found[name] = codes_N = dense(codes_N * (nothing + 1) + nth_N)[0]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Annotations of the topic


def speakers(text) -> np.ndarray | None:
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
    return _until_next([(start, names.index(name)) for start, name in marks], len(text))


def plays(text) -> np.ndarray | None:
    """The play, by the opening words in PLAYS; None where there are fewer than 2.

    Text before the first opening belongs to the play before it in the table.
    """
    names = list(PLAYS)
    marks = sorted((text.find(words), names.index(name)) for name, words in PLAYS.items() if words in text)
    if marks and marks[0][0] > 0 and marks[0][1] > 0:
        marks.insert(0, (0, marks[0][1] - 1))
    return _until_next(marks, len(text)) if len(marks) > 1 else None


def articles(text) -> np.ndarray | None:
    """The article of a Wikipedia dump, each from its `<page>` on; None where there are fewer than 2."""
    starts = [match.start() for match in re.finditer("<page>", text)]
    return _until_next([(start, i) for i, start in enumerate(starts)], len(text)) if len(starts) > 1 else None


def _until_next(marks, length) -> np.ndarray:
    """Each mark (place, value) holds until the next one; text before the first mark has a value of its own."""
    if marks[0][0] > 0:
        marks = [(0, 1 + max(value for _, value in marks)), *marks]
    places, values = np.array(marks).T
    return np.repeat(values, np.diff([*places, length]))
