"""Download one file over HTTP, complete and checked.

- `requests` retries what may pass (time-outs, 5xx, 429); a host that cannot be reached is given up after two tries, so
  that a machine without network moves on to the next source in seconds.
- A transfer that is cut goes on where it stopped, if a SHA-256 or the server's version of the file (ETag or date) can
  tell that the pieces belong together; with a SHA-256 so does a later call. Otherwise it starts again.
- The result is checked: its length, its SHA-256, and that it is no web page in place of the file.

    download(url, Path("enwik8.zip.part"), sha256="547994d9…")    # the caller moves it to its final name
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import requests
import urllib3
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from data.common import DataError
from support import files

Say = Callable[[str], None]

TRIES = 5
BACKOFF = 1.0  # seconds of the first pause between tries; each next one is twice as long
TIMEOUTS = (5.0, 30.0)  # seconds to connect, seconds without a byte
BLOCK = 1 << 14  # bytes read at a time: what a cut may lose
PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})")
PROBLEMS = (  # of an error or its cause; the first that fits is told
    (requests.exceptions.ProxyError, "the proxy refused or cannot be reached"),
    (requests.exceptions.SSLError, "the server's certificate was not accepted"),
    (urllib3.exceptions.NameResolutionError, "the host's name cannot be resolved (no network?)"),
    (urllib3.exceptions.NewConnectionError, "the connection was refused or there is no route"),
    (requests.exceptions.ConnectTimeout, f"no connection within {TIMEOUTS[0]:g} s"),
    (requests.exceptions.Timeout, f"no data for {TIMEOUTS[1]:g} s"),
    (urllib3.exceptions.TimeoutError, f"no data for {TIMEOUTS[1]:g} s"),
    (requests.exceptions.ConnectionError, "the connection was cut"),
    (urllib3.exceptions.ProtocolError, "the connection was cut"),
)


def silent(line: str) -> None:
    """Says nothing: the default `say`."""


def download(url: str, part: Path, sha256: str | None = None, say: Say = silent) -> None:
    """Leave the file behind `url` at `part`. With a SHA-256, a `part` left by an earlier call is continued.

    Raises DataError when the file cannot be had or is not the expected one, FileError when it cannot be written.
    """
    if sha256 is None:  # nothing could tell whether the bytes of an earlier call belong to this file
        remove(part)
    elif part.is_file() and sha256_of_file(part) == sha256:
        return
    pieced = _transfer(url, part, sha256 is not None, say)
    if pieced and sha256 not in (None, sha256_of_file(part)):
        say("the pieces of the download did not fit together; starting again")
        remove(part)
        _transfer(url, part, True, say)
    with open(part, "rb") as file:
        is_page = looks_like_html(file.read(512))
    found, size = sha256_of_file(part), part.stat().st_size
    if is_page or sha256 not in (None, found):
        remove(part)
    if is_page:
        raise DataError(f"{url}: sent a web page in place of the file (a login or error page, or a proxy's)")
    if sha256 not in (None, found):
        raise DataError(f"{url}: the file is not the expected one: {size:,} bytes, SHA-256 {found}, expected {sha256}")


def _transfer(url: str, part: Path, verified: bool, say: Say) -> bool:
    """Fill `part`, continuing after each cut. Returns whether it was put together from several answers.

    verified: a SHA-256 will be compared, so bytes that are already in `part` may be continued.
    """
    version = None  # of the file that `part` is the beginning of, as the server names it
    with requests.Session() as session:
        retry = Retry(TRIES - 1, connect=1, status_forcelist=PASSING_STATUS, backoff_factor=BACKOFF, backoff_max=30,
                      respect_retry_after_header=False, raise_on_status=False)  # fmt: skip
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        for attempt in range(TRIES):
            start = _size(part) if verified or version else 0
            with _ask(session, url, start, version) as response:
                if _continues(response, start, version):
                    version = _version_of(response)
                    problem = _receive(response, part)
                else:
                    remove(part)
                    problem = "the server has another file or range now"
            if problem is None:
                return start > 0 and response.status_code == 206
            if attempt < TRIES - 1:
                say(f"{problem}; trying again")
                time.sleep(BACKOFF * 2**attempt)
    raise DataError(f"{url}: {problem} ({TRIES} tries)")


def _ask(session: requests.Session, url: str, start: int, version: str | None) -> requests.Response:
    """The server's answer, its body still to be read. Raises DataError for any other than the file or a part of it."""
    headers = {"Accept-Encoding": "identity"}  # else Content-Length counts something other than the file's bytes
    if start:
        headers["Range"] = f"bytes={start}-"
    if start and version:
        headers["If-Range"] = version
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUTS)
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:  # those of requests are OSErrors
        raise DataError(f"{url}: {_problem_of(error)}") from error
    if response.status_code not in (200, 206, 416):
        raise DataError(f"{url}: HTTP {response.status_code} {response.reason}".rstrip())
    return response


def _continues(response: requests.Response, start: int, version: str | None) -> bool:
    """Whether the body is the whole file, or begins at `start` of the file whose beginning we have."""
    if response.status_code == 200:
        return True
    first, _ = _range_of(response)
    return first == start and (version is None or version == _version_of(response))


def _receive(response: requests.Response, part: Path) -> str | None:
    """Write the body to `part`, after what is there if it is a range. Returns why the file is not complete, or None."""
    start, total = _range_of(response) if response.status_code == 206 else (0, response.raw.length_remaining)
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.name.removesuffix(".part"),
               leave=False, disable=not sys.stderr.isatty())  # fmt: skip
    problem = None
    with writing(part), bar, open(part, "ab" if start else "wb") as file:
        try:
            for block in response.raw.stream(BLOCK, decode_content=False):  # .gz files are often marked as encoded
                file.write(block)
                bar.update(len(block))
        except urllib3.exceptions.HTTPError as error:
            problem = _problem_of(error)
        file.flush()
        os.fsync(file.fileno())
    size = _size(part)
    if total is not None and size != total:
        return f"{problem or 'the connection was cut'} after {size:,} of {total:,} bytes"
    return problem


def _range_of(response: requests.Response) -> tuple[int | None, int | None]:
    """(first byte, length of the whole file) of an answer's `Content-Range: bytes 5-9/10`; None for no such header."""
    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    return (int(match[1]), int(match[2])) if match else (None, None)


def _version_of(response: requests.Response) -> str | None:
    """The server's name for this version of the file, as If-Range takes it: a strong ETag, else the date."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _problem_of(error: Exception) -> str:
    cause = getattr(error.args[0], "reason", None) if error.args else None
    told = (words for kind, words in PROBLEMS if isinstance(error, kind) or isinstance(cause, kind))
    return next(told, f"cannot be asked for ({error})")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


# ---------------------------------------------------------------------------------------------------------------------
# Files

writing = partial(files.writing, way_out="free some space or choose another --out, then run the same command again")


def remove(path: Path) -> None:
    with writing(path):
        path.unlink(missing_ok=True)


def rename(part: Path, target: Path) -> None:
    with writing(target):
        os.replace(part, target)


def sha256_of_file(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def looks_like_html(head: bytes) -> bool:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:64].lower()
    return start.startswith((b"<!doctype html", b"<html", b"<head"))
