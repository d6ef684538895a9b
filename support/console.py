"""Error messages, exit codes and signals of a script.

console.run(main)                # calls main(argv), prints one message for an error, exits

with StopSignals() as signals:                  # Ctrl-C and kill wait until the loop looks
    while not signals.caught:
        ...
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from support.configurator import Message
from support.files import UserError, first_line, one_line

MISTAKE = 2  # exit codes; stopped by signal number n: 128 + n
NOT_FINITE = 3
PROCESS_LOST = 4  # another process of the run ended
MEMORY_WORDS = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed", "Overflow when")


class Failure(Exception):
    """A script ends early, and not by the user's mistake: the reason and the exit code."""

    def __init__(self, text, code):
        super().__init__(text)
        self.code = code


def run(main, out_of_memory="take something smaller"):
    """Call main(argv) -> exit code, and end the program with that code. out_of_memory: advice for a run that does not
    fit into memory."""
    name = Path(sys.argv[0]).name
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # where closed
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack a name's letters
    try:
        code = main(sys.argv[1:])
    except Message as message:
        code = tell(message, sys.stdout, 0)
    except Failure as failure:
        code = tell(f"{name}: {failure}", sys.stderr, failure.code)
    except UserError as error:
        code = tell(f"{name}: {error}", sys.stderr, MISTAKE)
    except BrokenPipeError:  # the reader, as head, has seen enough
        code = 0
    except OSError as error:
        what = f"{error.filename or 'a file'}: {error.strerror or error}"
        code = tell(f"{name}: {one_line(what)}", sys.stderr, MISTAKE)
    except KeyboardInterrupt:
        code = tell(f"{name}: stopped", sys.stderr, 128 + signal.SIGINT)
    except (MemoryError, RuntimeError, TypeError) as error:  # torch's OutOfMemoryError is a RuntimeError
        is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not is_memory and not any(words in str(error) for words in MEMORY_WORDS):
            raise
        reason = first_line(error)
        code = tell(f"{name}: out of memory ({reason}); {out_of_memory}", sys.stderr, MISTAKE)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def tell(text, stream, code):
    """Print a script's last message. -> code

    Of several processes the first speaks first, and the launcher then ends the others.
    """
    number = os.environ.get("RANK", "0")
    if number != "0":
        time.sleep(3)
        text = f"process {number}: {text}"
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(text, file=stream, flush=True)
    return code


class IgnoreClosedPipe:
    """A stream that drops its text, without an error, once the terminal or pipe behind it is closed."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def stopping_signals():
    """The signals that ask a program to end: Ctrl-C, kill, Slurm's USR1 before a job's time is over, and the closing of
    its terminal, unless nohup has that ignored."""
    kinds = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
    return [n for n in kinds if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


class Stopped(Exception):
    """A stopping signal came inside of StopSignals.unless_stopped."""


class StopSignals:
    """Inside, stopping signals are only listed in `caught`, for the loop to look at between two steps.

    second_ends: a second Ctrl-C ends the program on the spot. Other signals may come several times, as some launchers
    send them.
    """

    def __init__(self, second_ends=True):
        self.second_ends = second_ends

    def __enter__(self):
        self.caught, self.raising = [], False
        self.before = {number: signal.signal(number, self._catch) for number in stopping_signals()}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number, frame):
        self.caught.append(number)
        if number == signal.SIGINT and self.second_ends:
            signal.signal(number, signal.SIG_DFL)
        if self.raising:
            self.raising = False
            raise Stopped

    def unless_stopped(self, function, at_once=True):
        """function(), or None where a signal cut it short. at_once=False: signals wait, and nothing is cut short."""
        try:
            self.raising = at_once
            result = function()
            self.raising = False
            return result
        except Stopped:
            return None
        finally:
            self.raising = False


def duration(seconds: float) -> str:
    """'12.3 s', '4 min 5 s', '1.2 h'"""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{seconds / 3600:.1f} h"
