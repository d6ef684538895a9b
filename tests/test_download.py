"""data/download.py: from whatever a server does, the whole right file or one message, within bounded time.

The servers are on the loopback; none waits for longer than a test allows.
"""

from __future__ import annotations

import gzip
import hashlib
import io
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
import tqdm
from conftest import thorough
from test_data import CONTENT, OTHER, OWN, TOY, archive, file_size_limit, in_child, tmpfs, told

from data import build, download
from data.build import Remote, TextSpec, prepare
from data.common import DataError, Dataset

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
        for name, value in {"Content_Length": len(body), "ETag": self.server.tag, **headers}.items():
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
        self.body, self.tag, self.ranges, self.script, self.always = CONTENT, '"1"', [], [], whole
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
    tag = request.headers.get("If-Range")
    if tag is not None and tag != request.server.tag:
        start = 0
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
    body = request.server.body
    request.reply(body[:THIRD], Content_Length=len(body))


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


def drips(request: Request) -> None:
    request.send_response(200)
    request.end_headers()
    while not request.server.closing.wait(0.005):
        request.wfile.write(b"a")


def closes(request: Request) -> None:
    pass


def sends(raw: bytes) -> Act:
    """These bytes, headers among them."""
    return lambda request: request.wfile.write(raw)


def chunked(request: Request, end: bytes = b"0\r\n\r\n") -> None:
    request.reply(b"", Content_Length=None, Transfer_Encoding="chunked")
    body = request.server.body
    request.wfile.write(b"%x\r\n%b\r\n%x\r\n%b\r\n" % (THIRD, body[:THIRD], len(body) - THIRD, body[THIRD:]) + end)


def cut_chunked(request: Request) -> None:
    chunked(request, end=b"")


def another_range(request: Request) -> None:
    size = len(request.server.body)
    request.reply(request.server.body[7:], 206, Content_Range=f"bytes 7-{size - 1}/{size}")


def short_range(request: Request) -> None:
    """Of the range that was asked for, at most 40,000 bytes."""
    body, start = request.server.body, request.start()
    piece = body[start : start + 40_000]
    end = start + len(piece) - 1
    request.reply(piece, 206, Content_Range=f"bytes {start}-{end}/{len(body)}")


def range_whatever_changed(request: Request) -> None:
    """The range of the present file, also where If-Range names the one before."""
    body, start = request.server.body, request.start()
    request.reply(body[start:], 206, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")


def changes(request: Request) -> None:
    """Cut, and then the file is another."""
    cut(request)
    request.server.body, request.server.tag = OTHER, '"2"'


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def server():
    with closing(Server()) as running:
        yield running


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(download, "TIMEOUTS", (1.0, 0.1))


def fetch(server: Server, part: Path, sha256: str | None = TOY.sha256, path: str = "/toy") -> list[float]:
    """Download; the pauses that were made."""
    pauses = []
    download.download(server.url + path, part, sha256, pause=pauses.append)
    assert part.read_bytes() == server.body
    return pauses


# ---------------------------------------------------------------------------------------------------------------------
# What passes


@HASHES
def test_a_cut_download_goes_on_where_it_was_cut(server, tmp_path, sha256):
    server.script = [cut, cut]
    fetch(server, tmp_path / "part", sha256)
    assert server.ranges == [None, f"bytes={THIRD}-", f"bytes={THIRD + (len(CONTENT) - THIRD) // 3}-"]


@HASHES
def test_without_a_sha256_or_a_version_a_cut_download_starts_again(server, tmp_path, sha256):
    server.script, server.tag = [cut], None
    fetch(server, tmp_path / "part", sha256)
    assert server.ranges == [None, f"bytes={THIRD}-" if sha256 else None]


@HASHES
@pytest.mark.parametrize(
    "script",
    [
        [cut, ignores_ranges],
        [cut, another_range],
        [cut, short_range],
        [cut, status(416)],
        [cut, status(416, Content_Range="bytes */" + "9" * 5000)],
        [cut, status(206, Content_Range="bytes " + "9" * 5000 + "-7/8")],
        [short_range],
        [hangs],
        [hangs_midway],
        [drips],
        [closes] * 4,
        [sends(b"nonsense\r\n\r\n")],
        [sends(b"HTTP/1.0 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n")],
        [chunked],
        [cut_chunked],
        [sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc")],
        [with_headers(Content_Length=None)],
        [with_headers(Content_Length=-5)],
        [with_headers(Content_Length="abc")],
        [with_headers(Content_Length="9" * 5000)],
        [with_headers(Content_Length="5, 6")],
        [with_headers(Content_Length=len(CONTENT) + 9)],
        [with_headers(Transfer_Encoding="chunked"), whole],
        [redirect("/moved")],
        [redirect("/moved"), cut, redirect("/moved")],
        [status(503), status(429), status(500), status(408)],
    ],
)
def test_faults_that_pass_do_no_harm(server, tmp_path, impatient, script, sha256):
    server.script = list(script)
    fetch(server, tmp_path / "part", sha256)
    assert not server.script


@pytest.mark.parametrize(
    "wait, pause",
    [("7", 7.0), ("3600", 30.0), ("9" * 400, 30.0), ("-1", 1.0), ("soon", 1.0), ("Fri, 31 Dec 1999 23:59:59 GMT", 1.0)],
)
def test_a_server_may_ask_for_a_pause_within_bounds(server, tmp_path, wait, pause):
    server.script = [status(503, Retry_After=wait)]
    assert fetch(server, tmp_path / "part") == [pause]


def test_pauses_grow_until_there_is_progress(server, tmp_path):
    server.body = CONTENT * 10
    server.script = [status(503), status(429), status(500), cut, status(503), redirect("/moved")]
    sha256 = hashlib.sha256(server.body).hexdigest()
    assert fetch(server, tmp_path / "part", sha256) == [1.0, 2.0, 4.0, 1.0, 2.0]


def test_a_redirection_to_another_host_is_followed(server, tmp_path):
    with closing(Server()) as other:
        server.script = [redirect(f"http://localhost:{other.server_port}/there")]
        fetch(server, tmp_path / "part")
        assert len(other.ranges) == 1


@HASHES
@pytest.mark.parametrize("honest", [True, False], ids=["If-Range", "no If-Range"])
def test_a_file_that_changes_between_two_tries_is_never_mixed(server, tmp_path, sha256, honest):
    server.script = [changes] if honest else [changes, range_whatever_changed]
    fetch(server, tmp_path / "part", sha256 and hashlib.sha256(OTHER).hexdigest())


@pytest.mark.parametrize("second", [range_whatever_changed, ignores_ranges])
def test_a_file_that_changes_where_nothing_tells_versions_apart_is_never_mixed(server, tmp_path, second):
    server.tag = None
    server.script = [changes, second]
    server.always = with_headers(ETag=None)
    fetch(server, tmp_path / "part", hashlib.sha256(OTHER).hexdigest())
    server.script, server.body, server.tag = [changes, second], CONTENT, None
    fetch(server, tmp_path / "other", None)


@pytest.mark.parametrize("leftover", [CONTENT[:500], CONTENT, b"of another file", CONTENT + b"more"])
def test_what_an_earlier_download_left_is_used_only_if_it_fits(server, tmp_path, leftover):
    (tmp_path / "part").write_bytes(leftover)
    fetch(server, tmp_path / "part")
    assert server.ranges[0] == f"bytes={len(leftover)}-"


def test_leftovers_are_not_used_when_nothing_could_tell_that_they_fit(server, tmp_path):
    (tmp_path / "part").write_bytes(b"of another file")
    fetch(server, tmp_path / "part", sha256=None)
    assert server.ranges == [None]


@pytest.mark.parametrize("jump", [-1e9, -1.0, 0.0, 1e9])
def test_a_clock_that_jumps_breaks_nothing(server, tmp_path, monkeypatch, jump):
    """Also not the bar, whose library reads that clock."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = [1.7e9]

    def jumping() -> float:
        now[0] += jump * random.random()
        return now[0]

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(tqdm.std, "time", jumping)
    monkeypatch.setattr("sys.stderr", Terminal())
    server.script = [cut, status(503, Retry_After="2"), cut]
    assert fetch(server, tmp_path / "part") == [1.0, 2.0, 4.0]


# ---------------------------------------------------------------------------------------------------------------------
# What does not pass


@HASHES
@pytest.mark.parametrize(
    "act, requests, problem",
    [
        (status(404), 1, "HTTP 404 Not Found"),
        (status(403), 1, "HTTP 403 Forbidden"),
        (status(204), 1, "HTTP 204 No Content"),
        (status(302), 1, "HTTP 302 Found"),
        (status(503), 5, r"HTTP 503 Service Unavailable \(5 tries\)"),
        (status(416), 5, r"the server has no such range \(5 tries\)"),
        (status(416, Content_Range="bytes */0"), 5, r"the server has no such range \(5 tries\)"),
        (another_range, 5, r"another range than asked for \(5 tries\)"),
        (status(206), 5, r"another range than asked for \(5 tries\)"),
        (closes, 5, r"the connection was cut \(ConnectionError\) \(5 tries\)"),
        (sends(b"nonsense\r\n\r\n"), 5, r"the connection was cut .*\(5 tries\)"),
        (cut_and_ignores_ranges, 5, r"the connection ended after 33,333 of 100,000 bytes \(5 tries\)"),
        (with_headers(Content_Length=len(CONTENT) + 9), 5, r"ended after 100,000 of 100,009 bytes \(5 tries\)"),
        (with_headers(Content_Length=10**15), 5, r"ended after 100,000 of 1,000,000,000,000,000 bytes \(5 tries\)"),
        (with_headers(Content_Length="5, 6"), 5, r"answer makes no sense .*\(5 tries\)"),
        (cut_chunked, 5, r"the connection was cut \(ProtocolError\) \(5 tries\)"),
        (hangs, 5, r"no data for 0.1 s \(5 tries\)"),
        (hangs_midway, 5, r"no data for 0.1 s \(5 tries\)"),
        (drips, 5, r"only [0-9]+ bytes came in 0 s \(5 tries\)"),
        (with_headers(Content_Encoding="br"), 1, "sent as 'br', which was not asked for"),
        (page, 1, "sent a web page in place of the file"),
        (redirect("/toy"), 31, "not a usable address .Exceeded 30 redirects"),
        (redirect("file:///etc/passwd"), 1, "not a usable address .*file:///etc/passwd"),
        (redirect("http://[nonsense"), 1, "cannot be asked for .Invalid IPv6 URL"),
        (redirect("http://" + "a" * 70 + "/"), 1, "not a usable address .*label empty or too long"),
        (sends(b"HTTP/1.0 302 Found\r\nLocation: /\xff\xfe\r\n\r\n"), 1, "cannot be asked for .*codec can't decode"),
        (redirect("http://127.0.0.1:9/"), 2, r"the connection was refused or there is no route \(2 tries\)"),
    ],
)
def test_faults_that_do_not_pass_end_the_download(server, tmp_path, impatient, act, requests, problem, sha256):
    server.always, part = act, tmp_path / "part"
    with pytest.raises(DataError, match=f"{server.url}/toy: .*{problem}") as caught:
        fetch(server, part, sha256)
    assert "\n" not in str(caught.value) and requests <= len(server.ranges) <= requests + (sha256 is not None)
    assert sha256 or not part.exists()  # what is left can be gone on from


@pytest.mark.parametrize(
    "act, problem",
    [
        (with_headers(Content_Length=THIRD), "not the expected one: 33,333 bytes"),
        (lambda request: request.reply(OTHER), "not the expected one: 100,000 bytes"),
        (lambda request: request.reply(b""), "not the expected one: 0 bytes"),
        (lambda request: request.reply(gzip.compress(CONTENT), Content_Encoding="gzip"), "not the expected one"),
        (page, "web page"),
    ],
)
def test_the_wrong_file_is_refused_and_removed(server, tmp_path, act, problem):
    server.always = act
    with pytest.raises(DataError, match=problem):
        fetch(server, tmp_path / "part")
    assert len(server.ranges) == 1 and not list(tmp_path.iterdir())


def test_a_login_page_behind_a_redirection_is_refused(server, tmp_path):
    server.script = [redirect("/login"), page]
    with pytest.raises(DataError, match="sent a web page"):
        fetch(server, tmp_path / "part")
    assert not list(tmp_path.iterdir())


def test_pieces_that_never_fit_together_end_the_download(server, tmp_path):
    (tmp_path / "part").write_bytes(b"of another file")
    server.script = [range_whatever_changed, changes, range_whatever_changed]
    server.tag = None
    with pytest.raises(DataError, match="not the expected one"):
        fetch(server, tmp_path / "part")
    assert len(server.ranges) == 3 and not list(tmp_path.iterdir())


def test_going_back_and_forth_is_not_progress(server, tmp_path):
    """A cut, then a wrong range that removes what was there, and so on: all cuts end further than the file was."""
    server.script = [cut, another_range] * 50
    with pytest.raises(DataError, match="5 tries"):
        fetch(server, tmp_path / "part")
    assert len(server.ranges) == 5


def test_a_server_that_cuts_after_every_few_bytes_is_given_up(server, tmp_path):
    server.always = lambda request: whole(request, 0.001)
    with pytest.raises(DataError, match=r"the connection ended after [0-9]+ of 100,000 bytes \(5 tries\)"):
        fetch(server, tmp_path / "part")


def no_such_name(*arguments, **options):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize(
    "url, problem",
    [
        ("http://127.0.0.1:9/toy", r"the connection was refused or there is no route \(2 tries\)"),
        ("http://name.invalid/toy", r"the host's name cannot be resolved \(no network\?\) \(2 tries\)"),
        ("http://[nonsense", "not a usable address"),
        ("http:///toy", "not a usable address"),
        ("http://host:port/", "not a usable address"),
        ("http://host:99999999/", "not a usable address"),
        ("ftp://host/toy", "not a usable address"),
        ("http://a..b/toy", "not a usable address"),
        ("http://\udcff/toy", "not a usable address"),
    ],
)
def test_an_address_that_leads_nowhere_is_told_at_once(tmp_path, monkeypatch, url, problem):
    if "name.invalid" in url:
        monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    pauses = []
    with pytest.raises(DataError, match=problem):
        download.download(url, tmp_path / "part", pause=pauses.append)
    assert len(pauses) <= 1 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Whatever comes in whatever order

ACTS = (
    *(whole, cut, cut, ignores_ranges, cut_and_ignores_ranges, page, hangs, hangs_midway, drips, closes, chunked),
    *(cut_chunked, another_range, short_range, range_whatever_changed, changes),
    *(status(code) for code in (204, 206, 302, 404, 416, 429, 503)),
    *(with_headers(Content_Length=value) for value in (None, -5, "abc", "9" * 5000, "5, 6", 99_000, 100_009)),
    *(with_headers(ETag=value) for value in (None, 'W/"1"', '"3"')),
    *(with_headers(Content_Encoding=value) for value in ("br", "gzip")),
    *(redirect(address) for address in ("/toy", "/login", "http://127.0.0.1:9/", "file:///etc/passwd", "")),
    *(sends(raw) for raw in (b"\0", b"HTTP/1.1 200\r\n\r\nabc", b"HTTP/9.9 999 \xff\r\n:\r\n\r\n")),
)


@thorough(short=200, soak=5000)
def test_the_file_comes_whole_or_not_at_all(tmp_path, monkeypatch, n):
    """And once the server has come to its senses, the next download mends what was left."""
    for case in range(n):
        choose, part = random.Random(case), tmp_path / str(case)
        with closing(Server()) as server:
            server.script = choose.choices(ACTS, k=choose.randrange(1, 12))
            monkeypatch.setattr(download, "TIMEOUTS", (1.0, 0.03))
            try:
                download.download(server.url + "/toy", part, TOY.sha256, pause=lambda seconds: None)
            except DataError as error:
                assert "\n" not in str(error), case
            else:
                assert part.read_bytes() == CONTENT, case
            assert len(server.ranges) < 60, case
        monkeypatch.setattr(download, "TIMEOUTS", (5.0, 5.0))
        with closing(Server()) as server:
            fetch(server, part)


# ---------------------------------------------------------------------------------------------------------------------
# What prepare makes of it


def test_prepare_downloads_checks_and_keeps_the_archive(server, tmp_path):
    archive(tmp_path / "packed.zip", {"toy.txt": CONTENT})
    server.body = (tmp_path / "packed.zip").read_bytes()
    home = tmp_path / "home"
    spec = replace(TOY, remotes=(Remote(server.url + "/toy.zip"),))
    assert prepare(spec, home, home)["canonical"] and prepare(spec, home, home)["canonical"]
    assert len(server.ranges) == 1 and (home / "toy.txt.zip").read_bytes() == server.body


def test_a_downloaded_part_is_refused_or_named_and_never_kept_as_the_text(server, tmp_path):
    server.body, url = gzip.compress(CONTENT[:70_000]), server.url + "/toy.gz"
    with pytest.raises(DataError, match="not the published toy"):
        prepare(TOY, tmp_path, tmp_path, source=url)
    with pytest.raises(DataError, match="not the published toy"):
        prepare(replace(TOY, remotes=(Remote(url),)), tmp_path, tmp_path, allow_partial=True)
    assert not list(tmp_path.iterdir())
    assert prepare(TOY, tmp_path, tmp_path, source=url, allow_partial=True)["name"] == "toy-head-70K"
    assert not list(tmp_path.glob("toy*"))


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip"])
def test_a_text_that_was_compressed_unasked_is_read(server, tmp_path, encoding):
    server.always = lambda request: request.reply(gzip.compress(CONTENT), Content_Encoding=encoding)
    assert prepare(TOY, tmp_path, tmp_path, source=server.url + "/toy.txt")["canonical"]


@pytest.mark.parametrize("url", ["http://[nonsense", "https://", "HTTP://127.0.0.1:9/toy"])
def test_a_source_that_is_no_usable_address_is_named(tmp_path, url):
    with pytest.raises(DataError, match=r"no usable text\n- .*: (not a usable address|the connection was refused)"):
        prepare(OWN, tmp_path, tmp_path, source=url)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Full disks, kills, two at once


def spec_at(server: Server) -> TextSpec:
    return replace(TOY, remotes=(Remote(server.url + "/toy.txt", TOY.sha256),))


@thorough(short=5, soak=75)
def test_a_disk_that_fills_up_is_one_message_and_with_room_the_download_goes_on(server, tmp_path, n):
    with tmpfs(tmp_path / "disk", "size=1m") as disk:
        for room in np.linspace(0, 300_000, n).astype(int):
            folder = disk / str(room)
            folder.mkdir()
            (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - room // 4096 * 4096))
            message = told(spec_at(server), folder)
            assert message.count("\n") == 1 and message.startswith(str(folder))
            assert ": cannot be written: the disk is full; free some space and run the same command again" in message
            fetched = sum(path.stat().st_size for path in folder.glob("toy.txt*"))
            assert fetched >= min(room // 4096 * 4096, len(CONTENT)) - 4096 and not list(folder.glob("*.bin*"))
            (disk / "filler").unlink()
            server.ranges.clear()
            to_ask_for = [] if (folder / "toy.txt").exists() else [f"bytes={fetched}-" if fetched else None]
            assert prepare(spec_at(server), folder, folder)["canonical"] and server.ranges == to_ask_for
            shutil.rmtree(folder)


@pytest.mark.parametrize("limit", [0, 1, 40_000, 99_999])
@HASHES
def test_a_file_that_may_not_grow_is_one_message(server, tmp_path, limit, sha256):
    part = tmp_path / "part"
    with file_size_limit(limit), pytest.raises(DataError, match="part: cannot be written: larger than a file may"):
        fetch(server, part, sha256)
    assert part.exists() == (sha256 is not None)
    server.ranges.clear()
    fetch(server, part, sha256)
    assert server.ranges == [f"bytes={limit}-" if sha256 and limit else None]


def test_a_part_that_cannot_be_written_ends_the_search_for_sources(server, tmp_path):
    """As the next source would have the same disk."""
    folder = tmp_path / "toy"
    (folder / "toy.txt.part").mkdir(parents=True)
    message = told(replace(spec_at(server), rebuild=lambda *_: CONTENT), folder)
    assert message == f"{folder}/toy.txt.part: cannot be written: Is a directory; choose another --out\n"


def slowly(request: Request) -> None:
    """As a good server, but so that a kill meets the download at work."""
    body, start = request.server.body, request.start()
    request.reply(b"", 206 if start else 200, Content_Length=len(body) - start, Content_Range=range_from(start, body))
    for at in range(start, len(body), 4000):
        request.wfile.write(body[at : at + 4000])
        time.sleep(0.001)


def test_several_that_download_into_one_folder_take_turns(server, tmp_path):
    server.always = slowly
    children = [in_child(lambda: prepare(spec_at(server), tmp_path, tmp_path)) for _ in range(3)]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 3
    assert Dataset.open(tmp_path).canonical and (tmp_path / "toy.txt").read_bytes() == CONTENT
    assert len(server.ranges) == 1 and not list(tmp_path.glob("*.part"))


@thorough(short=10, soak=200)
def test_a_killed_download_goes_on_where_it_was(server, tmp_path, n):
    server.always, resumed = slowly, 0
    for case in range(n):
        folder, at = tmp_path / str(case), random.Random(case).randrange(len(CONTENT))
        part = folder / "toy.txt.part"
        child = in_child(partial(build.run, spec_at(server), folder, [], say=download.silent))
        while child.is_alive() and download._size(part) < at:
            time.sleep(0.0005)
        child.kill()
        child.join()
        left = part.stat().st_size if part.exists() else None
        assert not (folder / "toy.txt").exists() or (folder / "toy.txt").read_bytes() == CONTENT
        server.ranges.clear()
        build.run(spec_at(server), folder, [], say=download.silent)
        assert server.ranges == ([] if left is None else [f"bytes={left}-" if left else None])
        assert Dataset.open(folder).canonical and not list(folder.glob("*.part"))
        resumed += bool(left)
    assert resumed > n / 2
