"""Download one file over HTTP, complete and checked.

- `requests` retries what may pass (time-outs, 5xx, 429); a host that cannot be reached is given up after two tries, so
  that a machine without network moves on to the next source in seconds.
- With a SHA-256, which can tell that the pieces belong together, a transfer that is cut goes on where it stopped, also
  in a later call. Without one it starts again.
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
    ((requests.exceptions.Timeout, urllib3.exceptions.TimeoutError), f"no data for {TIMEOUTS[1]:g} s"),
    ((requests.exceptions.ConnectionError, urllib3.exceptions.ProtocolError), "the connection was cut"),
)


def silent(line: str) -> None:
    """Says nothing: the default `say`."""


def download(url: str, part: Path, sha256: str | None = None, say: Say = silent) -> None:
    """Leave the file behind `url` at `part`. With a SHA-256, a `part` left by an earlier call is continued.

    Raises DataError when the file cannot be had or is not the expected one, FileError when it cannot be written.
    """
    if sha256 is None:
        remove(part)
    elif part.is_file() and sha256_of_file(part) == sha256:
        return
    retry = Retry(TRIES - 1, connect=1, status_forcelist=PASSING_STATUS, backoff_factor=BACKOFF, backoff_max=30,
                  respect_retry_after_header=False, raise_on_status=False)  # fmt: skip
    with requests.Session() as session:
        session.mount("http://", HTTPAdapter(max_retries=retry))
        session.mount("https://", HTTPAdapter(max_retries=retry))
        for attempt in range(TRIES):
            start = part.stat().st_size if part.exists() else 0
            problem = _transfer(session, url, part, start)
            if problem is None and start and sha256_of_file(part) != sha256:
                problem = "the pieces of the download do not fit together"
                remove(part)
            if problem is None:
                break
            if sha256 is None:
                remove(part)
            if attempt < TRIES - 1:
                say(f"{problem}; trying again")
                time.sleep(BACKOFF * 2**attempt)
        else:
            raise DataError(f"{url}: {problem} ({TRIES} tries)")
    with open(part, "rb") as file:
        is_page = looks_like_html(file.read(512))
    found, size = sha256_of_file(part), part.stat().st_size
    if not is_page and sha256 in (None, found):
        return
    remove(part)
    if is_page:
        raise DataError(f"{url}: sent a web page in place of the file (a login or error page, or a proxy's)")
    raise DataError(f"{url}: the file is not the expected one: {size:,} bytes, SHA-256 {found}, expected {sha256}")


def _transfer(session: requests.Session, url: str, part: Path, start: int) -> str | None:
    """Fill `part`, which has the first `start` bytes. Returns why the file is not complete, or None.

    Raises DataError when the server sends neither the file nor a part of it.
    """
    headers = {"Accept-Encoding": "identity"}  # else Content-Length counts something other than the file's bytes
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUTS)
    except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:  # those of requests are OSErrors
        raise DataError(f"{url}: {_problem_of(error)}") from error
    with response:
        if response.status_code not in (200, 206, 416):
            raise DataError(f"{url}: HTTP {response.status_code} {response.reason}".rstrip())
        begin, total = _range_of(response)
        if begin not in (0, start):
            remove(part)
            return "the server has another file or range now"
        return _receive(response, part, begin, total)


def _receive(response: requests.Response, part: Path, start: int, total: int | None) -> str | None:
    """Write the body to `part` behind its first `start` bytes. Returns why the file is not complete, or None."""
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
    size = part.stat().st_size
    if total is not None and size != total:
        return f"{problem or 'the connection was cut'} after {size:,} of {total:,} bytes"
    return problem


def _range_of(response: requests.Response) -> tuple[int | None, int | None]:
    """(first byte of the body, length of the whole file), each None where the answer does not tell."""
    if response.status_code == 200:
        return 0, response.raw.length_remaining
    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    return (int(match[1]), int(match[2])) if match else (None, None)


def _problem_of(error: Exception) -> str:
    cause = getattr(error.args[0], "reason", None) if error.args else None
    told = (words for kind, words in PROBLEMS if isinstance(error, kind) or isinstance(cause, kind))
    return next(told, f"cannot be asked for ({error})")


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
