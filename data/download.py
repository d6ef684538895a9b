"""One file over HTTP, complete and checked, or a DataError that says why not.

- Retries what may pass (time-outs, 5xx, 429, cut connections) with growing pauses; gives up quickly on what will not
  (no network, connection refused, 404), so that a machine without network moves on to the next source in seconds.
- Ends, whatever the server does: tries that bring next to nothing are counted, a trickle among them. Only a server that
  sends its headers a byte at a time, each within the time-out, can hold it.
- Resumes after a cut where something can tell that the pieces belong together: a SHA-256 (then also what an earlier
  process left), or the server's mark of the file's version. Copes with servers that ignore ranges or send other ones.
- Verifies length and SHA-256; recognises a web page that came in place of the file.

    download(url, Path("enwik8.zip.part"), sha256="547994d9…")    # the caller moves it to its final name
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import requests
import urllib3  # what requests is built on: the raw body's faults are its exceptions
from tqdm import tqdm

from data.common import DataError

Say = Callable[[str], None]

TRIES = 5  # without progress between them
PROGRESS = 1 << 16  # bytes further than ever before, without which a try brought nothing worth another five
TRIES_UNREACHABLE = 2
TIMEOUTS = (5.0, 30.0)  # seconds to connect, seconds without a byte
SLOWEST = 1000.0  # bytes a second, over as many seconds as may pass without a byte
LONGEST_PAUSE = 30.0  # seconds, also for a server that asks for more
BLOCK = 1 << 18  # bytes read at a time, at most
PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
HOPELESS = (
    requests.exceptions.InvalidURL,
    requests.exceptions.InvalidSchema,
    requests.exceptions.TooManyRedirects,
    urllib3.exceptions.LocationValueError,
)
READ_ANYWAY = {"", "identity", "gzip", "x-gzip"}  # what Content-Encoding may say; .gz files are often marked so
DISK_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "larger than a file may become there",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EROFS: "the file system is read-only",
    errno.ENAMETOOLONG: "the path is too long",
    errno.EEXIST: "a file is in its place",
    errno.ENOTDIR: "a file is in the place of a folder",
}
FULL = {errno.ENOSPC, errno.EDQUOT}


def silent(line: str) -> None:
    """A `say` that says nothing."""


def download(
    url: str, part: Path, sha256: str | None = None, say: Say = silent, pause: Callable[[float], None] = time.sleep
) -> None:
    """Leave the file behind `url` at `part`. What an interruption leaves there is used by the next call.

    pause: called with the seconds to wait between tries. Raises DataError; a wrong file is removed first.
    """
    if sha256 is None:  # nothing would tell whether old leftovers belong to this file
        remove(part)
    for start_again in (True, False):
        pieced = _transfer(url, part, sha256, say, pause)
        if sha256 is None or (found := sha256_of_file(part)) == sha256:
            return
        size = _size(part)
        remove(part)
        if not (pieced and start_again):
            raise DataError(
                f"{url}: the file is not the expected one: {size:,} bytes, SHA-256 {found}, expected {sha256}"
            )
        say("the pieces of the download did not fit together; starting again")


def _transfer(url: str, part: Path, sha256: str | None, say: Say, pause: Callable[[float], None]) -> bool:
    """Leave at `part` a file of the right length that is no web page; whether it came in pieces."""
    transfer = _Transfer(url, part, sha256 is not None, say, pause)
    try:
        transfer.run()
    except DataError:
        if sha256 is None:  # nothing could go on from there
            remove(part)
        raise
    if looks_like_html(_head(part)):
        remove(part)
        raise DataError(f"{url}: sent a web page in place of the file (a login or error page, or a proxy's)")
    return transfer.pieced


class _Fault(Exception):
    """A try that failed but another may not: why, how many such tries are enough, and the server's wish to wait."""

    def __init__(self, reason: str, tries: int = TRIES, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.tries, self.wait = tries, wait


class _Transfer:
    """The tries at one download. `verified`: a SHA-256 will tell whether pieces of several tries belong together."""

    def __init__(self, url: str, part: Path, verified: bool, say: Say, pause: Callable[[float], None]) -> None:
        self.url, self.part, self.verified, self.say, self.pause = url, part, verified, say, pause
        self.version: str | None = None  # the server's mark of the file that `part` is the beginning of
        self.pieced = _size(part) > 0

    def run(self) -> None:
        furthest = failed = 0
        while True:
            try:
                return self._attempt()
            except _Fault as fault:
                if (size := _size(self.part)) >= furthest + PROGRESS:
                    furthest, failed = size, 0
                failed += 1
                if failed >= fault.tries:
                    raise DataError(f"{self.url}: {fault} ({failed} {'try' if failed == 1 else 'tries'})") from fault
                self.say(f"{fault}; trying again")
                unreachable = fault.tries == TRIES_UNREACHABLE
                self.pause(0.5 if unreachable else min(LONGEST_PAUSE, max(fault.wait, 2.0 ** (failed - 1))))

    def _attempt(self) -> None:
        try:
            with self._request() as response:
                if not self._already_complete(response):
                    self._receive(response)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _fault_of(error) from error

    def _request(self) -> requests.Response:
        try:
            return requests.get(self.url, headers=self._headers(), stream=True, timeout=TIMEOUTS)
        except (requests.RequestException, urllib3.exceptions.HTTPError):
            raise
        except (OSError, ValueError) as error:  # a redirection to nonsense, certificates that are not there
            raise DataError(f"{self.url}: cannot be asked for ({error})") from error

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}  # else Content-Length counts something other than the file's bytes
        have = _size(self.part)
        if have and (self.verified or self.version):
            headers["Range"] = f"bytes={have}-"
            if self.version:
                headers["If-Range"] = self.version
        return headers

    def _already_complete(self, response: requests.Response) -> bool:
        """416: nothing lies beyond what is here, as it is all, or not this file's beginning."""
        if response.status_code != 416:
            return False
        _, total = _content_range(response)
        if total and total == _size(self.part):
            return True
        remove(self.part)
        raise _Fault("the server has no such range")

    def _receive(self, response: requests.Response) -> None:
        encoding = response.headers.get("Content-Encoding", "").strip().lower()
        start, total = self._extent(response)
        if encoding not in READ_ANYWAY:
            raise DataError(f"{self.url}: sent as {encoding[:40]!r}, which was not asked for and is not read here")
        self.version = _version_of(response) or (self.version if start else None)
        response.raw.enforce_content_length = False  # we do, and tell how far it came
        with disk_faults(self.part), open(self.part, "ab" if start else "wb") as file:
            with _bar(self.part.name, start, total) as bar:
                for block in _blocks(response):
                    file.write(block)
                    bar.update(len(block))
            sync(file)
        if total is not None and _size(self.part) != total:
            raise _Fault(f"the connection ended after {_size(self.part):,} of {total:,} bytes")

    def _extent(self, response: requests.Response) -> tuple[int, int | None]:
        """Where in the file the body starts, and the file's length if it is told.

        The body starts at 0 also when the server ignored the range and sends everything."""
        length = response.raw.length_remaining  # Content-Length, where it is a length
        if response.status_code == 200:
            return 0, length
        if response.status_code == 206:
            start, total = _content_range(response)
            changed = start and self.version and _version_of(response) not in (None, self.version)
            if start != _size(self.part) or changed:
                remove(self.part)
                raise _Fault(
                    "the file changed meanwhile" if changed else "the server sent another range than asked for"
                )
            self.pieced = True
            return start, start + length if total is None and length is not None else total
        reason = f"HTTP {response.status_code} {response.reason}".rstrip()
        if response.status_code in PASSING_STATUS:
            wait = response.headers.get("Retry-After", "")
            raise _Fault(reason, wait=float(wait) if wait.isdecimal() else 0.0)
        raise DataError(f"{self.url}: {reason}")


def _blocks(response: requests.Response) -> Iterator[bytes]:
    """The body as it comes. Raises _Fault where it comes so slowly that it would hardly ever end."""
    since, received = time.monotonic(), 0
    while block := response.raw.read1(BLOCK, decode_content=False):
        yield block
        received += len(block)
        seconds = time.monotonic() - since
        if seconds >= TIMEOUTS[1]:
            if received < SLOWEST * seconds:
                raise _Fault(f"only {received:,} bytes came in {seconds:.0f} s")
            since, received = time.monotonic(), 0


def _fault_of(error: Exception) -> _Fault:
    """What an exception of requests or urllib3 means for another try, in words without its inner addresses."""
    if isinstance(error, requests.exceptions.ProxyError):
        return _Fault("the proxy refused or cannot be reached", TRIES_UNREACHABLE)
    if isinstance(error, requests.exceptions.SSLError):
        return _Fault("the server's certificate was not accepted", tries=1)
    if isinstance(error, HOPELESS):
        return _Fault(f"not a usable address ({error})", tries=1)
    if isinstance(error, (requests.exceptions.InvalidHeader, urllib3.exceptions.InvalidHeader)):
        return _Fault(f"the server's answer makes no sense ({error})")
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return _Fault(f"no connection within {TIMEOUTS[0]:g} s", TRIES_UNREACHABLE)
    cause = getattr(error.args[0], "reason", None) if error.args else None
    if isinstance(cause, urllib3.exceptions.NameResolutionError):
        return _Fault("the host's name cannot be resolved (no network?)", TRIES_UNREACHABLE)
    if isinstance(cause, urllib3.exceptions.NewConnectionError):
        return _Fault("the connection was refused or there is no route", TRIES_UNREACHABLE)
    if isinstance(error, (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError)):
        return _Fault(f"no data for {TIMEOUTS[1]:g} s")
    return _Fault(f"the connection was cut ({type(error).__name__})")


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """(start, total) of `Content-Range: bytes 5-9/10` or `bytes */10`; None for what is not told."""
    match = re.fullmatch(
        r"bytes (?:([0-9]{1,18})-[0-9]{1,18}|\*)/([0-9]{1,18}|\*)", response.headers.get("Content-Range", "").strip()
    )
    if match is None:
        return None, None
    start, total = match.groups()
    return (None if start is None else int(start)), (None if total == "*" else int(total))


def _version_of(response: requests.Response) -> str | None:
    """What If-Range may carry: a strong ETag, else the date."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _bar(name: str, start: int, total: int | None) -> tqdm:
    hidden = not sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        unit="B",
        unit_scale=True,
        desc=name.removesuffix(".part"),
        leave=False,
        disable=hidden,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Files


class DiskError(DataError):
    """The result cannot be written, wherever the text comes from."""


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` into a DiskError. Not for requests' calls: their errors are OSErrors
    too (those of urllib3, on whose response a body is read, are not)."""
    try:
        yield
    except OSError as error:
        reason = DISK_FAULTS.get(error.errno, error.strerror or error)
        again = "free some space and run the same command again, or " if error.errno in FULL else ""
        raise DiskError(f"{path}: cannot be written: {reason}; {again}choose another --out") from error


@contextmanager
def read_faults(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def sync(file) -> None:
    """Put an open file's bytes on the disk, so that a crash cannot leave its name on an empty file."""
    file.flush()
    os.fsync(file.fileno())


def remove(path: Path) -> None:
    with disk_faults(path):
        path.unlink(missing_ok=True)


def move(part: Path, target: Path) -> None:
    """Give a finished file its final name, at once and for good."""
    with disk_faults(target):
        os.replace(part, target)


def write(path: Path, content: bytes) -> None:
    with disk_faults(path), open(path, "wb") as file:
        file.write(content)
        sync(file)


def write_whole(target: Path, content: bytes) -> None:
    """Write a file that exists under its name either whole or not at all."""
    part = target.with_name(target.name + ".part")
    try:
        write(part, content)
        move(part, target)
    except DiskError:
        remove(part)
        raise


def sha256_of_file(path: Path) -> str:
    with read_faults(path), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def looks_like_html(head: bytes) -> bool:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head"))


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(512)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # none yet; whatever else is the matter, opening it will tell
        return 0
