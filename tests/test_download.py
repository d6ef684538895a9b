"""data/download.py: whatever a server does, the whole right file or one message. The servers are on the loopback."""

from __future__ import annotations

import gzip
import hashlib
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from conftest import thorough
from toy import CONTENT, OTHER, OWN, TOY, archive, file_size_limit, in_child, tmpfs, told

from data import build, download
from data.build import Remote, TextSpec, prepare_dataset
from data.common import DataError, Dataset
from support.files import FileError

THIRD = len(CONTENT) // 3
HASHES = pytest.mark.parametrize("sha256", [TOY.sha256, None], ids=["verified", "unverified"])


# ---------------------------------------------------------------------------------------------------------------------
# A server, and what it can do instead of its work


class Request(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        server.ranges.append(self.headers.get("Range"))
        act = server.script.pop(0) if server.script else server.always
        act(self)

    def start(self) -> int:
        """Where the asked-for range begins."""
        asked = self.server.ranges[-1]
        return int(asked[6:-1]) if asked else 0

    def reply(self, body: bytes = b"", status: int = 200, **headers: object) -> None:
        """Headers by their names with _ for -; None leaves one out."""
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client has left
            pass

    def log_message(self, *arguments) -> None:
        pass


Act = Callable[[Request], None]


class Server(ThreadingHTTPServer):
    """Serves `body` at any path; the next requests get what `script` says instead, all others what `always` says."""

    daemon_threads, block_on_close = True, False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.body, self.ranges, self.script, self.always = CONTENT, [], [], whole
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


def whole(request: Request, sent: float = 1.0) -> None:
    """What a good server does, up to the share `sent` of the body."""
    body, start = request.server.body, request.start()
    if start >= len(body):
        return request.reply(status=416, Content_Range=f"bytes */{len(body)}")
    rest = body[start:]
    sent_body = rest[: int(sent * len(rest))]
    request.reply(sent_body, 206 if start else 200, Content_Length=len(rest), Content_Range=range_from(start, body))


def range_from(start: int, body: bytes) -> str | None:
    return f"bytes {start}-{len(body) - 1}/{len(body)}" if start else None


def cut(request: Request) -> None:
    whole(request, 1 / 3)


def ignores_ranges(request: Request) -> None:
    request.reply(request.server.body)


def cut_and_ignores_ranges(request: Request) -> None:
    request.reply(request.server.body[:THIRD], Content_Length=len(request.server.body))


def status(code: int, **headers: object) -> Act:
    return lambda request: request.reply(b"no", code, **headers)


def redirect(location: str) -> Act:
    return status(302, Location=location)


def page(request: Request) -> None:
    request.reply(b"\n<!DOCTYPE html><title>Sign in</title>")


def with_headers(**headers: object) -> Act:
    """The whole body whatever was asked for, with these headers."""
    return lambda request: request.reply(request.server.body, **headers)


def hangs(request: Request) -> None:
    request.server.closing.wait(5)


def hangs_midway(request: Request) -> None:
    cut_and_ignores_ranges(request)
    hangs(request)


def closes(request: Request) -> None:
    pass


def cut_chunked(request: Request) -> None:
    request.reply(b"%x\r\n%b\r\n" % (THIRD, CONTENT[:THIRD]), Content_Length=None, Transfer_Encoding="chunked")


def another_range(request: Request) -> None:
    body = request.server.body
    request.reply(body[7:], 206, Content_Range=range_from(7, body))


def short_range(request: Request) -> None:
    """Of the range that was asked for, at most 40,000 bytes."""
    body, start = request.server.body, request.start()
    piece = body[start : start + 40_000]
    request.reply(piece, 206, Content_Range=f"bytes {start}-{start + len(piece) - 1}/{len(body)}")


def only_ranges(request: Request) -> None:
    """A range even where the whole file was asked for."""
    body, start = request.server.body, request.start()
    request.reply(body[start:], 206, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")


def changes(request: Request) -> None:
    """Cut, and then the file is another."""
    cut(request)
    request.server.body = OTHER


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """No pauses, and so long a time-out that a busy machine does not look like a silent server."""
    monkeypatch.setattr(download, "BACKOFF", 0)
    monkeypatch.setattr(download, "TIMEOUTS", (60.0, 60.0))


@pytest.fixture
def impatient(monkeypatch):
    """A short time-out, for servers that fall silent; on a busy machine others seem to as well."""
    monkeypatch.setattr(download, "TIMEOUTS", (1.0, 0.2))


@pytest.fixture
def server():
    with closing(Server()) as running:
        yield running


def fetch(server: Server, part: Path, sha256: str | None = TOY.sha256) -> None:
    download.download(server.url + "/toy", part, sha256)
    assert part.read_bytes() == server.body


# ---------------------------------------------------------------------------------------------------------------------
# Faults that pass


def test_a_cut_download_resumes_where_it_was_cut(server, tmp_path):
    server.script = [cut, cut]
    fetch(server, tmp_path / "part")
    assert server.ranges == [None, f"bytes={THIRD}-", f"bytes={THIRD + (len(CONTENT) - THIRD) // 3}-"]


def test_a_cut_download_starts_again_without_a_sha256(server, tmp_path):
    server.script = [cut]
    fetch(server, tmp_path / "part", sha256=None)
    assert server.ranges == [None, None]


@HASHES
@pytest.mark.parametrize(
    "script",
    [
        [cut, ignores_ranges],
        [cut, another_range],
        [cut, short_range],
        [cut, status(416)],
        [short_range],
        [closes] * 4,
        [cut_chunked],
        [with_headers(Content_Length=None)],
        [with_headers(Content_Length=len(CONTENT) + 9)],
        [redirect("/moved"), cut, redirect("/moved")],
        [status(503), status(429), status(500), status(408)],
    ],
)
def test_a_passing_fault_is_retried(server, tmp_path, script, sha256):
    server.script = list(script)
    fetch(server, tmp_path / "part", sha256)
    assert not server.script


@HASHES
@pytest.mark.parametrize("silence", [hangs, hangs_midway])
def test_a_server_that_falls_silent_is_asked_again(server, tmp_path, impatient, silence, sha256):
    server.script = [silence]
    fetch(server, tmp_path / "part", sha256)
    assert not server.script


@HASHES
@pytest.mark.parametrize("second", [whole, only_ranges, ignores_ranges])
def test_a_file_that_changes_between_tries_is_never_mixed(server, tmp_path, sha256, second):
    server.script = [changes, second]
    fetch(server, tmp_path / "part", sha256 and hashlib.sha256(OTHER).hexdigest())


@pytest.mark.parametrize("leftover", [CONTENT[:500], CONTENT, b"of another file", CONTENT + b"more"])
def test_leftovers_of_an_earlier_download_are_used_only_if_they_fit(server, tmp_path, leftover):
    (tmp_path / "part").write_bytes(leftover)
    fetch(server, tmp_path / "part")
    assert server.ranges[:1] == ([] if leftover == CONTENT else [f"bytes={len(leftover)}-"])


def test_leftovers_are_not_used_without_a_sha256(server, tmp_path):
    (tmp_path / "part").write_bytes(b"of another file")
    fetch(server, tmp_path / "part", sha256=None)
    assert server.ranges == [None]


def test_no_progress_bar_is_shown_without_a_terminal(server, tmp_path, capsys):
    fetch(server, tmp_path / "part")
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# Faults that stay


@HASHES
@pytest.mark.parametrize(
    "act, requests, problem",
    [
        (status(404), 1, "HTTP 404 Not Found"),
        (status(204), 1, "HTTP 204 No Content"),
        (status(302), 1, "HTTP 302 Found"),
        (status(503), 5, "HTTP 503 Service Unavailable"),
        (status(416), 5, r"another file or range now \(5 tries\)"),
        (another_range, 5, r"another file or range now \(5 tries\)"),
        (closes, 5, "the connection was cut"),
        (cut_and_ignores_ranges, 5, r"the connection was cut after 33,333 of 100,000 bytes \(5 tries\)"),
        (with_headers(Content_Length=10**15), 5, r"cut after 100,000 of 1,000,000,000,000,000 bytes \(5 tries\)"),
        (with_headers(Content_Length="5, 6"), 1, "cannot be asked for .Content-Length contained multiple"),
        (cut_chunked, 5, r"the connection was cut \(5 tries\)"),
        (page, 1, "sent a web page in place of the file"),
        (redirect("/toy"), 31, "cannot be asked for .Exceeded 30 redirects"),
        (redirect("file:///etc/passwd"), 1, "cannot be asked for .*file:///etc/passwd"),
        (redirect("http://[nonsense"), 1, "cannot be asked for .Invalid IPv6 URL"),
        (redirect("http://127.0.0.1:9/"), 1, "the connection was refused or there is no route"),
    ],
)
def test_a_lasting_fault_is_one_message(server, tmp_path, act, requests, problem, sha256):
    server.always = act
    with pytest.raises(DataError, match=f"{server.url}/toy: .*{problem}") as caught:
        fetch(server, tmp_path / "part", sha256)
    assert "\n" not in str(caught.value) and len(server.ranges) == requests


@HASHES
def test_a_server_that_is_always_silent_is_one_message(server, tmp_path, impatient, sha256):
    server.always = hangs_midway
    with pytest.raises(DataError, match=r"no data for .* s after [\d,]+ of 100,000 bytes \(5 tries\)") as caught:
        fetch(server, tmp_path / "part", sha256)
    assert "\n" not in str(caught.value) and len(server.ranges) >= 5


@pytest.mark.parametrize(
    "act, problem",
    [
        (with_headers(Content_Length=THIRD), "not the expected one: 33,333 bytes"),
        (lambda request: request.reply(OTHER), "not the expected one: 100,000 bytes"),
        (lambda request: request.reply(b""), "not the expected one: 0 bytes"),
        (page, "web page"),
    ],
)
def test_a_wrong_file_is_refused_and_removed(server, tmp_path, act, problem):
    server.always = act
    with pytest.raises(DataError, match=problem):
        fetch(server, tmp_path / "part")
    assert len(server.ranges) == 1 and not list(tmp_path.iterdir())


def test_pieces_that_never_fit_together_end_the_download(server, tmp_path):
    (tmp_path / "part").write_bytes(b"of another file")
    server.script = [only_ranges, changes, only_ranges]
    with pytest.raises(DataError, match="not the expected one"):
        fetch(server, tmp_path / "part")
    assert len(server.ranges) == 4 and not list(tmp_path.iterdir())


def no_such_name(*arguments, **options):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize(
    "url, problem",
    [
        ("http://127.0.0.1:9/toy", "the connection was refused or there is no route"),
        ("http://name.invalid/toy", r"the host's name cannot be resolved \(no network\?\)"),
        ("http://[nonsense", "cannot be asked for"),
        ("http://host:port/", "cannot be asked for"),
        ("ftp://host/toy", "cannot be asked for"),
        ("http://\udcff/toy", "cannot be asked for"),
    ],
)
def test_an_address_that_leads_nowhere_is_told_at_once(tmp_path, monkeypatch, url, problem):
    if "name.invalid" in url:
        monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    with pytest.raises(DataError, match=problem):
        download.download(url, tmp_path / "part")
    assert not list(tmp_path.iterdir())


ACTS = (whole, cut, cut, ignores_ranges, cut_and_ignores_ranges, page, hangs, hangs_midway, closes, cut_chunked,
        another_range, short_range, only_ranges, changes, redirect("/toy"),
        *(status(code) for code in (404, 416, 503)),
        *(with_headers(Content_Length=value) for value in (None, "abc", 99_000, 100_009)))  # fmt: skip


@thorough(short=25, soak=2000)
def test_the_file_comes_whole_or_not_at_all_and_the_next_download_mends_it(tmp_path, monkeypatch, n):
    for case in range(n):
        choose, part = random.Random(case), tmp_path / str(case)
        with closing(Server()) as server:
            server.script = choose.choices(ACTS, k=choose.randrange(1, 12))
            monkeypatch.setattr(download, "TIMEOUTS", (1.0, 0.03))
            try:
                download.download(server.url + "/toy", part, TOY.sha256)
            except DataError as error:
                assert "\n" not in str(error), case
            else:
                assert part.read_bytes() == CONTENT, case
        monkeypatch.setattr(download, "TIMEOUTS", (60.0, 60.0))
        with closing(Server()) as server:
            fetch(server, part)


# ---------------------------------------------------------------------------------------------------------------------
# prepare.py with an address


def test_prepare_downloads_checks_and_keeps_the_archive(server, tmp_path):
    archive(tmp_path / "packed.zip", {"toy.txt": CONTENT})
    server.body = (tmp_path / "packed.zip").read_bytes()
    home = tmp_path / "home"
    spec = replace(TOY, remotes=(Remote(server.url + "/toy.zip"),))
    assert prepare_dataset(spec, home, home)["canonical"] and prepare_dataset(spec, home, home)["canonical"]
    assert len(server.ranges) == 1 and (home / "toy.txt.zip").read_bytes() == server.body


def test_a_downloaded_part_of_the_text_is_refused_or_named_and_never_kept(server, tmp_path):
    server.body, url = gzip.compress(CONTENT[:70_000]), server.url + "/toy.gz"
    with pytest.raises(DataError, match="not the published toy"):
        prepare_dataset(TOY, tmp_path, tmp_path, source=url)
    with pytest.raises(DataError, match="not the published toy"):
        prepare_dataset(replace(TOY, remotes=(Remote(url),)), tmp_path, tmp_path, allow_partial=True)
    assert not list(tmp_path.iterdir())
    assert prepare_dataset(TOY, tmp_path, tmp_path, source=url, allow_partial=True)["name"] == "toy-head-70K"
    assert not list(tmp_path.glob("toy*"))


def test_a_text_that_was_compressed_unasked_is_read(server, tmp_path):
    server.always = lambda request: request.reply(gzip.compress(CONTENT), Content_Encoding="gzip")
    assert prepare_dataset(TOY, tmp_path, tmp_path, source=server.url + "/toy.txt")["canonical"]


@pytest.mark.parametrize("url", ["http://[nonsense", "https://", "HTTP://127.0.0.1:9/toy"])
def test_a_source_that_is_no_usable_address_is_named(tmp_path, url):
    with pytest.raises(DataError, match=r"no usable text\n- .*: (cannot be asked for|the connection was refused)"):
        prepare_dataset(OWN, tmp_path, tmp_path, source=url)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Full disks, kills, two at once


def spec_at(server: Server) -> TextSpec:
    return replace(TOY, remotes=(Remote(server.url + "/toy.txt", TOY.sha256),))


@thorough(short=4, soak=75)
def test_a_full_disk_is_one_message_and_with_room_the_download_resumes(server, tmp_path, n):
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        for room in np.linspace(0, 300_000, n).astype(int):
            folder = disk / str(room)
            folder.mkdir()
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - room // 4096 * 4096))
            message = told(spec_at(server), folder)
            assert message.count("\n") == 1 and message.startswith(str(folder))
            assert " could not be written: the disk is full; free some space or choose another --out" in message
            fetched = sum(path.stat().st_size for path in folder.glob("toy.txt*"))
            assert fetched >= min(room, len(CONTENT)) - download.BLOCK and not list(folder.glob("*.bin*"))
            (disk / "filler").unlink()
            server.ranges.clear()
            to_ask_for = [] if fetched == len(CONTENT) else [f"bytes={fetched}-" if fetched else None]
            assert prepare_dataset(spec_at(server), folder, folder)["canonical"] and server.ranges == to_ask_for
            shutil.rmtree(folder)


@pytest.mark.parametrize("limit", [0, 40_000, 99_999])
@HASHES
def test_a_file_size_limit_is_one_message(server, tmp_path, limit, sha256):
    part = tmp_path / "part"
    with file_size_limit(limit), pytest.raises(FileError, match="part could not be written: File too large; "):
        fetch(server, part, sha256)
    server.ranges.clear()
    fetch(server, part, sha256)
    assert server.ranges == [f"bytes={limit}-" if sha256 and limit else None]


def test_a_part_that_cannot_be_written_ends_the_search_for_sources(server, tmp_path):
    """As the next source would have the same disk."""
    folder = tmp_path / "toy"
    (folder / "toy.txt.part").mkdir(parents=True)
    message = told(replace(spec_at(server), rebuild=lambda *_: CONTENT), folder)
    assert message.startswith(f"{folder}/toy.txt.part could not be written: Is a directory; ")


def slowly(request: Request) -> None:
    """As a good server, but so that a kill meets the download at work."""
    body, start = request.server.body, request.start()
    request.reply(b"", 206 if start else 200, Content_Length=len(body) - start, Content_Range=range_from(start, body))
    for at in range(start, len(body), 4000):
        request.wfile.write(body[at : at + 4000])
        time.sleep(0.001)


def test_concurrent_downloads_into_one_folder_take_turns(server, tmp_path):
    server.always = slowly
    children = [in_child(lambda: prepare_dataset(spec_at(server), tmp_path, tmp_path)) for _ in range(3)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 3
    assert Dataset.open(tmp_path).canonical and (tmp_path / "toy.txt").read_bytes() == CONTENT
    assert len(server.ranges) == 1 and not list(tmp_path.glob("*.part"))


@thorough(short=4, soak=100)
def test_a_killed_download_resumes(server, tmp_path, n):
    server.always, resumed = slowly, 0
    for case in range(n):
        folder, at = tmp_path / str(case), random.Random(case).randrange(len(CONTENT))
        part = folder / "toy.txt.part"
        child = in_child(partial(build.main, spec_at(server), folder, [], say=download.silent))
        while child.is_alive() and (part.stat().st_size if part.exists() else 0) < at:
            time.sleep(0.0005)
        child.kill()
        child.join()
        left = part.stat().st_size if part.exists() else None
        assert not (folder / "toy.txt").exists() or (folder / "toy.txt").read_bytes() == CONTENT
        server.ranges.clear()
        build.main(spec_at(server), folder, [], say=download.silent)
        assert server.ranges == ([] if left in (None, len(CONTENT)) else [f"bytes={left}-" if left else None])
        assert Dataset.open(folder).canonical and not list(folder.glob("*.part"))
        resumed += bool(left)
    assert resumed >= n / 4
