"""console.py: one message and one exit code for whatever ends a script; signals wait for the end of what is being
done, and a second one does not."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from support import console
from support.configurator import Message
from support.options import ConfigError


def ending(monkeypatch, capsys, error, **options):
    """(exit code, stdout, stderr) of a script that ends with this."""

    def main(argv):
        if isinstance(error, BaseException):
            raise error
        return error

    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])
    with pytest.raises(SystemExit) as caught:
        console.run(main, **options)
    return caught.value.code, *capsys.readouterr()


@pytest.mark.parametrize(
    "error, expected",
    [
        (0, (0, "", "")),
        (3, (3, "", "")),
        (Message("the page"), (0, "the page\n", "")),
        (ConfigError(["a", "b"]), (2, "", "train.py: a\nb\n")),
        (console.Failure("it is over", 4), (4, "", "train.py: it is over\n")),
        (OSError(28, "No space left on device", "a.json"), (2, "", "train.py: a.json: No space left on device\n")),
        (OSError(5, "Input/output error"), (2, "", "train.py: a file: Input/output error\n")),
        (KeyboardInterrupt(), (130, "", "train.py: stopped\n")),
        (torch.OutOfMemoryError("too\nbig"), (2, "", "train.py: out of memory (too); take less\n")),
        (MemoryError(), (2, "", "train.py: out of memory (no reason given); take less\n")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_end_is_one_message_and_one_code(monkeypatch, capsys, error, expected):
    assert ending(monkeypatch, capsys, error, out_of_memory="take less") == expected


def test_a_cpu_without_memory_says_it_in_other_words(monkeypatch, capsys):
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 48)
    code, _, message = ending(monkeypatch, capsys, caught.value)
    assert code == 2 and message.startswith("train.py: out of memory (") and message.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), KeyError("x"), AssertionError()])
def test_a_bug_keeps_its_traceback(monkeypatch, error):
    def main(argv):
        raise error

    with pytest.raises(type(error)):
        console.run(main)


@pytest.mark.parametrize("way", ["print({})", "raise console.UserError({})"])
def test_a_terminal_without_the_letters_is_no_error(way):
    """As over a serial line, or with LANG=C."""
    statement = way.format("'é ⏎ \\udcff 🧪'")
    code = f"from support import console\n\ndef main(argv):\n    {statement}\n\nconsole.run(main)\n"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=environment)
    assert done.returncode == (2 if "raise" in way else 0) and b"Traceback" not in done.stderr
    assert rb"\xe9 \u23ce \udcff" in done.stdout + done.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "from support import console\n\n"
    code += "def main(argv):\n    while True:\n        print('x' * 1000)\n\nconsole.run(main)\n"
    done = subprocess.run(["sh", "-c", f'{sys.executable} -c "{code}" | head -1'], cwd=ROOT, capture_output=True)
    assert done.stderr == b""


def test_of_several_processes_the_first_speaks_first(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for number in ("0", "3"):
        monkeypatch.setenv("RANK", number)
        code, _, message = ending(monkeypatch, capsys, ConfigError(["wrong"]))
        assert (code, message) == (2, "process 3: train.py: wrong\n" if waited else "train.py: wrong\n")
    assert len(waited) == 1


def test_what_nobody_reads_any_more_is_lost_and_nothing_else():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

    stream = console.IgnoreClosedPipe(Closed())
    print("hello", file=stream, flush=True)
    assert not stream.closed


# ---------------------------------------------------------------------------------------------------------------------
# Signals


def test_signals_wait_and_are_listed():
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests too may run under nohup
    before = {number: signal.getsignal(number) for number in console.stopping_signals()}
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP} == set(before)
    with console.StopSignals() as signals:
        for number in before:
            os.kill(os.getpid(), number)
        assert signals.caught == list(before)
    assert {number: signal.getsignal(number) for number in before} == before
    signal.signal(signal.SIGHUP, hang_up)


@pytest.mark.parametrize("at_once", [True, False])
def test_where_nothing_is_half_done_a_signal_stops_at_once(at_once):
    done = []

    def work():
        os.kill(os.getpid(), signal.SIGUSR1)
        done.append("the rest")
        return "a result"

    with console.StopSignals() as signals:
        assert signals.unless_stopped(work, at_once) == (None if at_once else "a result")
        assert signals.caught == [signal.SIGUSR1] and bool(done) is not at_once
        os.kill(os.getpid(), signal.SIGTERM)  # outside of it, it waits
        assert signals.unless_stopped(lambda: 5) == 5


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in console.stopping_signals()
        with console.StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.caught == []
    finally:
        signal.signal(signal.SIGHUP, before)


def stubborn():
    with console.StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(3):  # a launcher's, and those that it passes on
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)


def test_a_second_ctrl_c_ends_the_program_on_the_spot(forkserver):
    process = forkserver.Process(target=stubborn)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGINT


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">/dev/full", ">&- 2>&-"])
def test_a_script_needs_nobody_who_listens(closed):
    code = "import sys; from support import console\n\n"
    code += "def main(argv):\n    print('hello', file=console.IgnoreClosedPipe(sys.stdout), flush=True)\n"
    code += "    return 3\n\nconsole.run(main)\n"
    done = subprocess.run(["sh", "-c", f'{sys.executable} -c "{code}" {closed}'], cwd=ROOT, capture_output=True)
    assert done.returncode == 3 and done.stderr == b""
