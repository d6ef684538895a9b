"""What each character of a text is called, on texts small enough to be labelled by hand, as characters and as bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import annotation
from analysis.annotation import annotate
from data.characters import CLASSES
from data.common import Vocabulary

SCENE = """\
BRUTUS:
It is the bright day.

CASSIUS:
And therefore: speak.

BRUTUS:
No.
"""


BRUTUS, CASSIUS = 0, 1  # labels of speakers: by name


def vocabulary_of(text, unit):
    return Vocabulary(unit, tuple(sorted(set(text if unit == "character" else text.encode()))))


def annotated(text, unit="character", context=None):
    vocabulary = vocabulary_of(text, unit)
    ids_N = vocabulary.encode(text)
    return annotate(ids_N, vocabulary, np.bincount(ids_N, minlength=vocabulary.size), context)


def stretches(labels):
    """[(label, how many in a row)]"""
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist()]
    return [(int(labels[a]), b - a) for a, b in zip(edges, [*edges[1:], len(labels)])]


@pytest.mark.parametrize("unit", ["character", "byte"])
@pytest.mark.parametrize("text", ["One.", SCENE, "é œ “Ah”\n", "<page>a<page>b"])
def test_every_character_has_a_label(text, unit):
    length = len(text) if unit == "character" else len(text.encode())
    for labels in annotated(text, unit).values():
        assert labels.shape == (length,) and labels.dtype == np.int64 and labels.min() >= 0


def test_annotations_that_do_not_apply_are_left_out_and_the_order_is_fixed():
    own = ["character", "class", "frequency band", "place in the word"]
    assert list(annotated("only words")) == [*own, *annotation.CONTEXT, "passage"]
    assert list(annotated(SCENE)) == [*own, "place in the line", *annotation.CONTEXT, "speaker", "passage"]
    both = {*annotation.SYNTAX, *annotation.CONTEXT, *annotation.TOPIC, *own}
    assert set(annotated(SCENE)) | {"play", "article"} == both


def test_symbols_have_printable_names():
    names = ["a", "space", "newline", "tab", "é", "U+0300", "byte 0xC3", "newline"]
    assert [annotation.name_of(symbol) for symbol in (*"a \n\té\u0300", 0xC3, 10)] == names


def test_classes_are_those_of_the_records():
    expected = ["capital", "vowel", "space", "digit", "punctuation", "newline", "consonant", "other"]
    for unit, expected_here in (("character", expected), ("byte", [*expected, "other"])):
        assert [CLASSES[label] for label in annotated("Aa 1.\nbé", unit)["class"]] == expected_here
    assert [CLASSES[label] for label in annotation.class_of(vocabulary_of("ab", "byte"))] == ["vowel", "consonant"]


# ---------------------------------------------------------------------------------------------------------------------
# Frequency bands


@pytest.mark.parametrize(
    "counts, bands",
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([2, 9, 2, 0, 3], [3, 1, 3, 3, 2]),  # of 16, in their order: middles at 4.5, 10.5, 13, 15; quarters of 4
        ([0, 0, 4, 4], [3, 3, 1, 3]),  # middles at 2 and 6 of 8, where a quarter begins
    ],
)
def test_frequency_bands_by_hand(counts, bands):
    assert annotation.frequency_bands(counts).tolist() == bands


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=80))
def test_each_band_holds_a_quarter_of_the_text_to_within_a_symbol(counts):
    bands, counts = annotation.frequency_bands(counts), np.array(counts)
    held = np.bincount(bands, counts, 4)
    assert (abs(held - counts.sum() / 4) <= counts.max()).all()
    order = np.argsort(-counts, kind="stable")
    assert (np.diff(bands[order]) >= 0).all()  # none is commoner than one of an earlier band
    assert (bands[counts == 0] == 3).all()


# ---------------------------------------------------------------------------------------------------------------------
# Places


def places_in_word(text, unit="character"):
    return "".join(map(str, annotated(text, unit)["place in the word"]))


def test_places_in_words_by_hand():
    assert places_in_word("To sleep, perchance") == "1201234500123455555"
    assert places_in_word("I'll o'er 'tis dogs' a''b") == "123401234001230" + "12345" + "012" + "01"
    assert places_in_word("x2y [[Zz]]") == "1010001200"
    assert places_in_word("née") == "123"
    assert places_in_word("née", "byte") == "1234"


def test_places_in_lines_by_hand():
    text = "ab\n\n" + "c" * 50 + "\nd"
    expected = [(0, 1), (1, 2), (0, 2), (1, 3), (2, 12), (3, 24), (4, 11), (0, 1)]
    assert stretches(annotated(text)["place in the line"]) == expected


@settings(deadline=None)
@given(st.text("aB' \n:é", min_size=2, max_size=40), st.data())
def test_syntax_and_context_do_not_depend_on_later_characters(text, data):
    length = data.draw(st.integers(1, len(text) - 1))
    vocabulary = vocabulary_of(text, "character")
    ids_N, counts_V = vocabulary.encode(text), np.ones(vocabulary.size)
    whole, part = (annotate(ids, vocabulary, counts_V) for ids in (ids_N, ids_N[:length]))
    for name in set(part) - set(annotation.TOPIC):
        whole_N, part_N = whole[name][:length], part[name]
        if name in annotation.CONTEXT:  # whose codes are dense: the same partition
            whole_N, part_N = (np.unique(of, return_inverse=True)[1] for of in (whole_N, part_N))
        assert np.array_equal(whole_N, part_N), name


# ---------------------------------------------------------------------------------------------------------------------
# Contexts


def partition(keys):
    first = {}
    return [first.setdefault(key, len(first)) for key in keys]


@pytest.mark.parametrize("context", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("n, name", list(enumerate(annotation.CONTEXT, start=1)))
@pytest.mark.parametrize("unit", ["character", "byte"])
def test_contexts_are_the_symbols_before_within_the_window(unit, n, name, context):
    text = "abracadabra, é bébé, abracadabra"
    symbols = list(text if unit == "character" else text.encode())
    window = context or len(symbols)
    keys = [tuple(symbols[max(i - n, i // window * window) : i]) for i in range(len(symbols))]
    labels = annotated(text, unit, context)[name]
    assert partition(labels.tolist()) == partition(keys)
    assert set(labels.tolist()) == set(range(len(set(keys))))


def test_contexts_of_the_largest_vocabulary_stay_apart():
    vocabulary = Vocabulary("character", tuple(map(chr, [*range(0xD800), *range(0xE000, 0x10800)])))
    assert vocabulary.size == 1 << 16
    last = vocabulary.size - 1
    ids_N = np.array([last, last, last, 0, last, last, last, 0, 0])
    labels = annotate(ids_N, vocabulary, np.ones(vocabulary.size))["previous three"]
    assert partition(labels.tolist()) == [0, 1, 2, 3, 4, 5, 6, 3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Topics


@pytest.mark.parametrize("unit", ["character", "byte"])
def test_a_speaker_speaks_until_the_next_one(unit):
    text = SCENE.replace("bright", "brîght")
    lengths = [len(part if unit == "character" else part.encode()) for part in text.split("\n\n")]
    expected = [(BRUTUS, lengths[0] + 2), (CASSIUS, lengths[1] + 2), (BRUTUS, lengths[2])]
    assert stretches(annotated(text, unit)["speaker"]) == expected


def test_text_before_the_first_speaker_has_none():
    assert stretches(annotated("so?\n\n" + SCENE)["speaker"])[:2] == [(CASSIUS + 1, 5), (BRUTUS, 31)]


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_split_may_begin_in_the_middle_of_a_speech(cut):
    text = ("A word.\n\n" + SCENE)[cut:]
    assert annotated(text)["speaker"][-1] == BRUTUS


@pytest.mark.parametrize("start", ["", "\n", "\n\n"])
def test_a_split_may_begin_in_the_blank_line_before_a_speaker(start):
    assert set(annotated(start + SCENE)["speaker"][len(start) :]) == {BRUTUS, CASSIUS}


@pytest.mark.parametrize(
    "text",
    [
        SCENE.replace("CASSIUS", "BRUTUS"),  # one speaker
        SCENE.replace(":\n", ": "),
        SCENE.replace("\n\n", "\n"),  # one paragraph, so one mark
        SCENE.replace("BRUTUS:", "brutus:").replace("CASSIUS:", "cassius:"),
        SCENE + "\n" + "A long paragraph of prose, in which nobody speaks. " * 3,
        "A list follows. " * 9 + "\n\nUses:\none, two\n\nKinds:\nthree\n\n" + "More of it. " * 9,
    ],
)
def test_prose_has_no_speakers(text):
    assert "speaker" not in annotated(text)


def test_a_speaker_may_have_no_words():
    text = "ALL:\n\nFirst Citizen:\n\nALL, &c:\nYes.\n"
    assert stretches(annotated(text)["speaker"]) == [(0, 6), (2, 16), (1, 14)]  # by name


def script(*plays):
    return "".join(f"{annotation.PLAYS[play]}\nAnd so on, at length.\n\n" for play in plays)


@pytest.mark.parametrize("unit", ["character", "byte"])
def test_plays_are_found_by_their_opening_words(unit):
    plays = list(annotation.PLAYS)
    assert stretches(annotated(script(*plays), unit)["play"]) == [
        (i, len(script(play))) for i, play in enumerate(plays)
    ]


def test_text_before_the_first_opening_belongs_to_the_play_before():
    text = "of the shrew.\n\n" + script("The Tempest")
    shrew, tempest = (list(annotation.PLAYS).index(name) for name in ("The Taming of the Shrew", "The Tempest"))
    assert stretches(annotated(text)["play"]) == [(shrew, 15), (tempest, len(script("The Tempest")))]
    text = "A preface.\n\n" + script("Coriolanus", "Richard III")
    before, *plays = [play for play, _ in stretches(annotated(text)["play"])]
    assert plays == [0, 1] and before not in plays


@pytest.mark.parametrize("text", [script("The Tempest"), "A preface.\n\n" + script("Coriolanus"), SCENE])
def test_one_play_is_no_topic(text):
    assert "play" not in annotated(text)


def test_articles_begin_at_their_page():
    parts = [
        "<siteinfo/>\n  ",
        "<page>\n    <title>Été</title>\n    <text>a &lt;page&gt; b</text>\n  </page>\n  ",
        "<page>\n",
    ]
    before, *articles = stretches(annotated("".join(parts), "byte")["article"])
    assert [before[1], *articles] == [len(parts[0]), (0, len(parts[1].encode())), (1, len(parts[2]))]
    assert before[0] not in (0, 1)


def test_one_article_is_no_topic():
    assert "article" not in annotated("siteinfo <page><title>A</title>")


@pytest.mark.parametrize("length", [5, 16, 33, 1600])
def test_passages_are_equally_long(length):
    labels = annotated("a" * length)["passage"]
    assert labels[0] == 0 and (np.diff(labels) >= 0).all()
    sizes = np.bincount(labels, minlength=annotation.PASSAGES)
    assert sizes.max() - sizes.min() <= 1
