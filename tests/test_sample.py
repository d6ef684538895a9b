"""sample.py: the text that a model writes, and the experts shown with it."""

import re
import shutil
import sys
import unicodedata

import pytest
import torch
from conftest import prepare_text, train_tiny

import sample
from data.common import DataError, Vocabulary
from run import checkpoint
from run.checkpoint import CheckpointError
from selection import main_expert
from speed import decoding
from support.options import ConfigError, choices_of, options_of

RULE = "\n" + "-" * 40 + "\n"
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def run(capsys):
    """A function that runs sample.py in process and returns what it printed."""

    def call(out_dir, *options):
        capsys.readouterr()
        assert sample.main([f"--out_dir={out_dir}", "--device=cpu", *options]) == 0
        return capsys.readouterr().out

    return call


@pytest.fixture
def altered(moe_run, tmp_path):
    """A function that copies the MoE run with its best.pt changed, and returns the copy's folder."""

    def alter(change):
        folder = tmp_path / "altered"
        shutil.copytree(moe_run, folder)
        state = checkpoint.load(folder / "best.pt")
        change(state)
        checkpoint.save(folder / "best.pt", state)
        return folder

    return alter


def refused(kind, out_dir, *options):
    """The message with which sample.py refuses; nothing of a traceback's size."""
    with pytest.raises(kind) as caught:
        sample.main([f"--out_dir={out_dir}", "--device=cpu", *options])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


# ---------------------------------------------------------------------------------------------------------------------
# The text


def test_a_sample_is_the_prompt_and_exactly_max_new_tokens(run, dense_run):
    text = run(dense_run, "--start=The", "--max_new_tokens=50")
    assert text.startswith("The") and len(text) == 3 + 50 + 1


def test_a_prompt_longer_than_block_size_is_printed_whole(run, dense_run):
    prompt = "the of and to in that is was he for it"
    text = run(dense_run, f"--start={prompt}", "--max_new_tokens=5")
    assert text.startswith(prompt) and len(text) == len(prompt) + 5 + 1


def test_a_sample_depends_on_its_own_seed_alone(run, moe_run):
    first, second, third = run(moe_run, "--num_samples=3", "--seed=7", "--max_new_tokens=40").split(RULE)
    assert run(moe_run, "--seed=8", "--max_new_tokens=40") == second + "\n"
    assert run(moe_run, "--num_samples=2", "--seed=8", "--max_new_tokens=40") == second + RULE + third
    assert first != second != third.rstrip("\n")


def test_temperature_0_and_top_k_1_write_the_most_likely_characters_whatever_the_seed(run, dense_run):
    options = [["--temperature=0", "--seed=1"], ["--temperature=0", "--seed=2"], ["--temperature=1", "--top_k=1"]]
    assert len({run(dense_run, "--max_new_tokens=40", *some) for some in options}) == 1


def test_checkpoint_last_is_another_file_than_best(run, dense_run, tmp_path):
    shutil.copytree(dense_run, tmp_path / "run")
    (tmp_path / "run" / "best.pt").unlink()
    assert run(tmp_path / "run", "--checkpoint=last", "--max_new_tokens=5")
    assert "best.pt" in refused(CheckpointError, tmp_path / "run")


def test_a_byte_model_writes_text(run, byte_words, tmp_path):
    assert train_tiny(byte_words, tmp_path / "run", max_iters=1) == 0
    text = run(tmp_path / "run", "--start=été", "--max_new_tokens=30")
    assert text.startswith("été")


def test_stop_ends_each_sample_after_that_text_and_changes_nothing_before_it(run, moe_run):
    options = ["--start=The", "--max_new_tokens=60", "--seed=3", "--num_samples=2"]
    whole = run(moe_run, *options).rstrip("\n").split(RULE)
    stop = whole[0][30:32]
    ends = [text.find(stop, 3) for text in whole]
    assert 3 < ends[0] <= 30 and sum(end >= 0 for end in ends) >= 1
    expected = [text if end < 0 else text[: end + 2] for text, end in zip(whole, ends)]
    assert run(moe_run, *options, f"--stop={stop}") == RULE.join(expected) + "\n"


def test_stop_is_looked_for_in_new_characters_only(run, dense_run):
    plain = run(dense_run, "--start=The", "--max_new_tokens=20", "--seed=3")
    assert run(dense_run, "--start=The", "--max_new_tokens=20", "--seed=3", "--stop=The") == plain
    across = f"--stop={plain[2:4]}"  # begins in the prompt
    assert len(run(dense_run, "--start=The", "--max_new_tokens=20", "--seed=3", across)) > 5


def test_the_last_character_before_a_stop_has_its_expert(run, moe_run):
    options = ["--show_experts", "--start=The", "--max_new_tokens=12"]
    (text,), (numbers,) = (rows[:1] for rows in rows_of(run(moe_run, *options))[1:])
    _, stopped, stopped_numbers = rows_of(run(moe_run, *options, f"--stop={text[4:6]}"))
    end = text.index(text[4:6], 3) + 2
    assert (stopped, stopped_numbers) == ([text[:end]], [numbers[:end]])


def test_a_decoder_that_is_asked_for_changes_no_text_and_says_why_it_is_not_taken(run, dense_run, capsys):
    options = ["--start=The", "--max_new_tokens=20"]
    plain = run(dense_run, *options)
    sample.main([f"--out_dir={dense_run}", "--device=cpu", *options, "--decoder=fused"])
    out, err = capsys.readouterr()
    assert out == plain and err.startswith("decoder=fused: ") and "(not fused: it needs CUDA)" in err
    assert choices_of(options_of(sample.SampleConfig)["decoder"]) == list(decoding.DECODERS)


def test_a_stop_that_cannot_be_written_is_refused(dense_run):
    assert "'é' at 1" in refused(DataError, dense_run, "--stop=aé")


# ---------------------------------------------------------------------------------------------------------------------
# The prompt


def test_a_prompt_is_read_from_a_file(run, dense_run, tmp_path):
    (tmp_path / "prompt.txt").write_text("which one\nyou were")
    assert run(dense_run, f"--start=FILE:{tmp_path}/prompt.txt", "--max_new_tokens=5").startswith("which one\nyou were")


def test_a_prompt_file_that_is_missing_is_named(dense_run, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        sample.main([f"--out_dir={dense_run}", f"--start=FILE:{tmp_path}/absent.txt", "--device=cpu"])
    assert caught.value.filename.endswith("absent.txt") or caught.value.filename == tmp_path / "absent.txt"


def test_a_prompt_file_that_is_not_utf8_is_refused(dense_run, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe\x00")
    message = refused(DataError, dense_run, f"--start=FILE:{tmp_path}/prompt.txt")
    assert "prompt.txt" in message and "UTF-8" in message


def test_unknown_characters_of_the_prompt_are_named(dense_run):
    message = refused(DataError, dense_run, "--start=the é and ß")
    assert "'é' at 4" in message and "'ß' at 10" in message and "not in the vocabulary" in message


def test_an_empty_prompt_is_a_newline(run, dense_run):
    assert run(dense_run, "--max_new_tokens=5").startswith("\n")


@pytest.mark.parametrize(
    "unit, symbols, prompt",
    [
        ("character", "\t\n a", "\n"),
        ("character", "\t a", " "),
        ("character", "ACGT", "A"),
        ("character", "天", "天"),
        ("byte", b"\t\n a", b"\n"),
        ("byte", b"\t a", b" "),
        ("byte", b"\x80\xa9\xc3", b"\xc3"),  # a character does not begin with the first two
        ("byte", b"\x80", b"\x80"),
    ],
)
def test_the_default_prompt_is_in_the_vocabulary(unit, symbols, prompt):
    vocabulary = Vocabulary(unit, tuple(symbols))
    (start,) = sample.prompt_ids("", vocabulary)
    assert vocabulary.symbols[start] == prompt[0]


def test_a_text_without_space_and_newline_is_sampled_by_the_printed_command(run, tmp_path, capsys):
    dataset = prepare_text(tmp_path / "data", "ACGTTGCA" * 500)
    assert train_tiny(dataset, tmp_path / "run", max_iters=1) == 0
    command = capsys.readouterr().out.rpartition("sample.py ")[2].split()
    assert command == [f"--out_dir={tmp_path}/run"]
    text = run(tmp_path / "run", "--max_new_tokens=5")
    assert text.startswith("A") and len(text) == 1 + 5 + 1


@pytest.mark.parametrize("source", ["file", "option"])
@pytest.mark.parametrize(
    "symbols, text, prompt",
    [
        ("\nab", "\ufeffa\r\nb\n", "a\nb\n"),
        ("\n\rab", "\ufeffa\r\nb\n", "a\r\nb\n"),  # trained on CR LF
        ("\nab\ufeff", "\ufeffa\r\nb\n", "\ufeffa\nb\n"),
        ("ab", "\ufeffab\r\n", "ab"),  # no line breaks at all, as in text8
        ("\nab", "\r\n", "\n"),
        ("ab", "\ufeff\r\n", "a"),
        (b"\nab", "\ufeffa\r\nb", "a\nb"),
        (bytes(range(256)), "\ufeffa\r\nb\n", "\ufeffa\r\nb\n"),
    ],
)
def test_marks_of_editors_leave_a_prompt_only_where_the_vocabulary_lacks_them(symbols, text, prompt, source, tmp_path):
    vocabulary = Vocabulary("byte" if isinstance(symbols, bytes) else "character", tuple(symbols))
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    start = f"FILE:{tmp_path}/prompt.txt" if source == "file" else text
    assert sample.prompt_ids(start, vocabulary) == vocabulary.encode(prompt).tolist()


@pytest.mark.parametrize("unit", ["character", "byte"])
@pytest.mark.parametrize("trained, typed", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_of_a_prompt_take_the_form_of_the_text(trained, typed, unit):
    """é is one character or two, which look alike; systems and editors differ in which they write."""
    text = unicodedata.normalize(trained, "café Ångström")
    symbols = text if unit == "character" else text.encode()
    vocabulary = Vocabulary(unit, tuple(sorted(set(symbols))))
    ids = sample.prompt_ids(unicodedata.normalize(typed, "café"), vocabulary)
    assert vocabulary.decode(ids) == unicodedata.normalize(trained, "café")


def test_a_prompt_of_known_symbols_keeps_its_form():
    both = Vocabulary("character", tuple(sorted({*"cafeé", "\u0301"})))
    for text in ("café", "cafe\u0301"):
        assert both.decode(sample.prompt_ids(text, both)) == text
    with pytest.raises(DataError, match="'́' at 1"):  # told as it was typed
        sample.prompt_ids("e\u0301", Vocabulary("character", ("e",)))


def test_a_checkpoint_in_the_place_of_its_folder_is_named(dense_run):
    with pytest.raises(CheckpointError, match="best.pt: is a file; expected the folder of a run"):
        sample.main([f"--out_dir={dense_run / 'best.pt'}"])


def test_a_carriage_return_alone_is_no_mark_of_an_editor():
    with pytest.raises(DataError, match=r"'\\r' at 1"):
        sample.prompt_ids("a\rb", Vocabulary("character", ("\n", "a", "b")))


# ---------------------------------------------------------------------------------------------------------------------
# The experts


def rows_of(output):
    """-> (legend, text rows, number rows) of the output with experts, without colours."""
    legend, *rows = output.rstrip("\n").split("\n")
    return legend, rows[0::2], rows[1::2]


def test_every_character_has_an_expert_number_under_it(run, moe_run):
    legend, texts, numbers = rows_of(run(moe_run, "--show_experts", "--start=The", "--max_new_tokens=60"))
    assert legend == "block 1: expert 0  expert 1  expert 2  expert 3"
    assert len(texts) == len(numbers)
    for text, number in zip(texts, numbers):
        assert len(text) == len(number) and set(number) <= set("0123.")
    assert sum(map(len, texts)) == 63


@pytest.mark.parametrize("start", ["", "of and\nto"])
def test_showing_experts_does_not_change_the_text(run, moe_run, start):
    options = [f"--start={start}", "--max_new_tokens=60", "--seed=3"]
    _, texts, _ = rows_of(run(moe_run, "--show_experts", *options))
    shown = "".join(text.replace("⏎", "\n") for text in texts)
    assert shown + "\n" == run(moe_run, *options)


@pytest.mark.parametrize("layer", [0, 1])
def test_expert_numbers_are_those_of_one_forward_pass(run, moe_run, layer):
    output = run(moe_run, "--show_experts", f"--layer={layer}", "--start=The", "--max_new_tokens=12")
    _, texts, numbers = rows_of(output)
    model, vocabulary, _ = sample.load_model(sample.SampleConfig(out_dir=str(moe_run)), "cpu")
    text = "".join(texts).replace("⏎", "\n")
    with torch.no_grad():
        routing = model(torch.tensor(vocabulary.encode(text))[None]).routing[layer]
    assert output.startswith(f"block {layer}: ")
    assert "".join(numbers) == digits(main_expert(routing))
    assert len(set("".join(numbers)) - {"."}) > 1


def digits(experts):
    """Expert numbers as they are shown; a dot for a character that every expert dropped."""
    return "".join("." if expert < 0 else str(expert) for expert in experts.tolist())


def test_expert_numbers_stay_aligned_beyond_block_size(run, moe_run):
    """When the cache is rebuilt, half a window is read again; only its last character is new."""
    _, _, numbers = rows_of(
        run(moe_run, "--show_experts", "--start=The", "--max_new_tokens=60", "--temperature=1", "--seed=5")
    )
    model, vocabulary, _ = sample.load_model(sample.SampleConfig(out_dir=str(moe_run)), "cpu")
    generator = torch.Generator().manual_seed(5)
    first, *later = model.generate(
        torch.tensor(vocabulary.encode("The"))[None], 61, temperature=1, generators=[generator]
    )
    expected = digits(first.experts(1)[0]) + "".join(digits(step.experts(1)[0, -1:]) for step in later)
    assert "".join(numbers) == expected
    assert any(step.experts(1).size(1) == 8 for step in later)


def test_a_prompt_beyond_block_size_is_shown_with_experts(run, moe_run):
    """The model reads only its last block_size characters; the first have no expert."""
    prompt = "the of and to in that is was he for it"
    _, texts, numbers = rows_of(run(moe_run, "--show_experts", f"--start={prompt}", "--max_new_tokens=5"))
    assert "".join(texts).startswith(prompt)
    assert [len(text) for text in texts] == [len(number) for number in numbers]


def as_terminal(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_colours_have_a_legend_and_are_always_reset(run, moe_run, monkeypatch):
    as_terminal(monkeypatch)
    output = run(moe_run, "--show_experts", "--start=The", "--max_new_tokens=60", "--seed=3")
    legend, _, body = output.partition("\n")
    assert ESCAPE.sub("", legend).split() == "block 1: expert 0 expert 1 expert 2 expert 3".split()
    assert len(set(re.findall(r"48;2;\d+;\d+;\d+", legend))) == 4
    assert set(re.findall(r"48;2;\d+;\d+;\d+", body)) <= set(re.findall(r"48;2;\d+;\d+;\d+", legend))
    for line in output.split("\n"):
        assert line.count("\x1b[0m") * 2 == line.count("\x1b[")


def test_colours_do_not_change_the_text(run, moe_run, monkeypatch):
    options = ["--start=The", "--max_new_tokens=60", "--seed=3"]
    plain = run(moe_run, *options)
    as_terminal(monkeypatch)
    _, _, body = run(moe_run, "--show_experts", *options).partition("\n")
    assert ESCAPE.sub("", body).replace("⏎", "") == plain


def test_no_color_is_obeyed(run, moe_run, monkeypatch):
    as_terminal(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run(moe_run, "--show_experts", "--max_new_tokens=5")


def written(writer, ids, capsys):
    """What a writer prints for ids, all of expert 1."""
    capsys.readouterr()
    for token in ids:
        writer.write(token, 1)
    writer.close()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [b"caf\xc3\xa9", b"caf\xc3\xa9\n", b"caf\xc3", b"\xff\xc3\xa9"],
    ids=["whole", "with newline", "ends within a character", "not UTF-8"],
)
def test_number_rows_of_a_byte_model_lose_no_character(text, capsys):
    bytewise = Vocabulary("byte", tuple(range(256)))
    plain = written(sample.PlainWriter(bytewise), text, capsys)
    rows = written(sample.NumberWriter(bytewise), text, capsys).rstrip("\n").split("\n")
    assert rows[0].replace("⏎", "\n") + "\n" == plain
    assert len(rows[1]) == len(rows[0]) and rows[1].startswith("11")


def test_more_than_ten_experts_keep_rows_aligned(capsys):
    writer = sample.NumberWriter(Vocabulary("character", ("a", "b")))
    writer.write(0, 3)
    writer.write(1, 13)
    writer.close()
    assert capsys.readouterr().out == "ab\n33\n"


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_experts_of_a_dense_model_are_refused(dense_run):
    message = refused(ConfigError, dense_run, "--show_experts")
    assert "dense" in message and "--show_experts" in message


@pytest.mark.parametrize("layer", [2, 99])
def test_a_block_without_experts_is_refused_and_those_with_experts_are_told(moe_run, layer):
    message = refused(ConfigError, moe_run, "--show_experts", f"--layer={layer}")
    assert f"--layer={layer}" in message and "block 0, 1" in message


@pytest.mark.parametrize(
    "option", ["--backend=nccl", "--init_from=resume", "--init_from=gpt2", "--compile=True", "--compile"]
)
def test_a_key_of_nanogpt_that_is_absent_is_answered_by_one_helpful_line(dense_run, option):
    message = refused(ConfigError, dense_run, option)
    assert message.startswith(f"{option}: leave it out, ") and "nearest" not in message


@pytest.mark.parametrize(
    "option",
    [
        "--temperature=-0.5",
        "--num_samples=0",
        "--checkpoint=newest",
        "--tempertaure=1",
    ],
)
def test_impossible_options_are_refused_by_name(moe_run, option):
    assert option in refused(ConfigError, moe_run, option)


def test_a_run_must_be_named():
    with pytest.raises(ConfigError, match="--out_dir"):
        sample.main(["--device=cpu"])


def test_a_missing_out_dir_is_named(tmp_path):
    message = refused(CheckpointError, tmp_path / "nowhere")
    assert "nowhere" in message and "no such folder" in message


def test_a_folder_that_is_no_run_is_named(tmp_path):
    message = refused(CheckpointError, tmp_path)
    assert "holds no best.pt" in message and "out_dir of a run?" in message


def test_weights_that_do_not_fit_the_vocabulary_are_refused(altered):
    def shorten(state):
        state["vocabulary"]["vocabulary"] = state["vocabulary"]["vocabulary"][:-1]
        state["vocabulary"]["vocab_size"] -= 1

    message = refused(CheckpointError, altered(shorten))
    assert "best.pt" in message and "do not fit" in message and "token_embedding" in message


def test_a_model_that_is_not_causal_is_refused_with_the_reason(altered):
    message = refused(ConfigError, altered(lambda state: state["config"].update(capacity_group="batch")))
    assert (
        "capacity_group=batch" in message
        and "cannot be sampled" in message
        and "capacity_group=sequence can" in message
    )


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda state: state.pop("model"), "has no model"),
        (lambda state: state["model"].pop("norm.weight"), 'Missing key(s) in state_dict: "norm.weight"'),
        (lambda state: state["model"].update({"norm.weight": torch.ones(16, dtype=torch.int64)}), "do not fit"),
        (lambda state: state["config"].update(n_embd=10**12), "do not fit"),
        (lambda state: state["config"].update(n_layer=1000), "it has 2 blocks, and n_layer is 1000"),
        (lambda state: state["config"].update(n_shared_expert=2**62), "do not fit"),
        (lambda state: state["vocabulary"].update(vocab_size=torch.ones(2)), "vocab_size is tensor"),
    ],
)
def test_a_checkpoint_with_wrong_content_is_refused(altered, change, told):
    message = refused(CheckpointError, altered(change))
    assert "best.pt" in message and told in message


def test_an_endless_prompt_file_is_refused(dense_run):
    with pytest.raises(OSError, match="pipe or a device"):
        sample.main([f"--out_dir={dense_run}", "--device=cpu", "--start=FILE:/dev/zero"])
