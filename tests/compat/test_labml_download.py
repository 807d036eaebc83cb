"""Downloads from a server that cuts lines, forgets ranges, changes files and lies."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bioinit.compat import labml
from bioinit.compat.labml import _download
from bioinit.errors import ConfigError, CorruptCheckpoint, StorageError

STEP = "global_step10"
DATA = bytes(range(256)) * 1200  # about 300 kB


class Server(ThreadingHTTPServer):
    """Serves ``files``; what it does wrong is set by the test."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.cut_after: list[int] = []
        """Bytes after which each of the next answers ends."""
        self.answers: list[tuple[int, dict[str, str]]] = []
        """Status and headers of the next answers, in the place of a file."""
        self.knows_ranges = True
        self.says_length = True
        self.validator = "ETag"
        self.minds_if_range = True
        self.adds: dict[str, str] = {}
        """Headers of every answer with a file."""
        self.gate: threading.Barrier | None = None
        self.pause = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/weights"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, name = self.server, self.path.removeprefix("/weights/")
        asked = self.headers.get("Range")
        server.asked.append((name, asked))
        self.close_connection = True
        if server.answers:
            status, headers = server.answers.pop(0)
            self.send_response(status)
            for key, value in {"Content-Length": "0", **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            return
        if name not in server.files:
            self.send_error(404)
            return
        if server.gate is not None:
            server.gate.wait(timeout=10)
        data = server.files[name]
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        is_same = self.headers.get("If-Range", etag) == etag or not server.minds_if_range
        first, end = 0, len(data)
        if asked and server.knows_ranges and is_same:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups()
            first, end = int(first), min(len(data), int(last or len(data)) + 1)
            if first >= len(data):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        if server.says_length:
            self.send_header("Content-Length", str(end - first))
        if server.validator:
            self.send_header("ETag", etag)
        for key, value in server.adds.items():
            self.send_header(key, value)
        self.end_headers()
        body = data[first:end]
        if server.cut_after:
            body = body[: server.cut_after.pop(0)]
        with suppress(ConnectionError):  # who asked may have been killed
            for at in range(0, len(body), 2**14):
                self.wfile.write(body[at : at + 2**14])
                time.sleep(server.pause)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(_download, "_FIRST_WAIT", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def download(server, to, *names, **more):
    return labml.download(base_url=server.url, to=to, files=names, **more)


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


def test_a_checkpoint_comes_whole_and_can_be_read(server, fixtures_dir, tmp_path):
    source = fixtures_dir / "gpt_neox"
    names = labml.get_files_to_download(3, depth=3, step=STEP, beside=("latest",), ranks=2)
    server.files = {name: (source / name).read_bytes() for name in names}
    told = []
    to = labml.download(
        base_url=server.url,
        to=tmp_path / "new/place",
        files=names,
        progress=lambda *said: told.append(said),
    )
    assert to == tmp_path / "new/place" and hidden(to) == []
    assert {name: (to / name).read_bytes() for name in names} == server.files
    ends = {name: (done, total) for name, done, total in told}
    assert ends == {name: (len(data), len(data)) for name, data in server.files.items()}
    layers = labml.LayerGenerator(n_vocab=128, n_hidden=64, n_layers=3, n_heads=4, path=to)
    assert len(list(layers.load())) == 6
    server.asked.clear()
    labml.download(base_url=f"{server.url}/", to=to, files=[f"./{name}" for name in names])
    assert sorted(server.asked) == sorted((name, "bytes=0-0") for name in names)


def test_the_default_is_the_list_and_the_folder_of_the_original(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server.files = dict.fromkeys(labml.get_files_to_download(1), b"file")
    to = labml.download(1, base_url=server.url)
    assert to == tmp_path / "data/neox/slim_weights"
    assert {str(p.relative_to(to)) for p in to.rglob("*") if p.is_file()} == server.files.keys()


def test_a_line_that_is_cut_again_and_again_brings_the_file(server, tmp_path):
    server.files["a"] = DATA
    server.cut_after = [100_000, 70_000, 0, 50_000]
    place = tmp_path / "a"
    seen = []
    download(server, tmp_path, "a", retries=2, progress=lambda *_: seen.append(place.exists()))
    assert place.read_bytes() == DATA and hidden(tmp_path) == []
    starts = [None, "bytes=100000-", "bytes=170000-", "bytes=170000-", "bytes=220000-"]
    assert server.asked == [("a", start) for start in starts]
    assert not any(seen), "it had its name before it was whole"


def test_what_arrived_before_a_failure_is_gone_on_with_by_the_next_call(server, tmp_path):
    server.files["a/b"] = DATA
    server.cut_after = [200_000, 0]
    with pytest.raises(StorageError, match=r"cannot download http.*/a/b: .*is kept: try again"):
        download(server, tmp_path, "a/b", retries=1)
    assert not (tmp_path / "a/b").exists()
    assert hidden(tmp_path) == [".b.part", ".b.part.json"]
    server.asked.clear()
    download(server, tmp_path, "a/b")
    assert server.asked == [("a/b", "bytes=200000-")]
    assert (tmp_path / "a/b").read_bytes() == DATA and hidden(tmp_path) == []


def test_a_file_that_changed_on_the_server_is_fetched_from_the_start(server, tmp_path):
    server.files["a"] = DATA
    server.cut_after = [200_000, 0]
    with pytest.raises(StorageError):
        download(server, tmp_path, "a", retries=0)
    server.files["a"] = DATA[::-1]
    server.cut_after = []
    download(server, tmp_path, "a")
    assert (tmp_path / "a").read_bytes() == DATA[::-1]


def test_a_server_that_goes_on_with_another_file_is_asked_from_the_start(server, tmp_path):
    server.files["a"] = DATA
    server.cut_after = [200_000, 0]
    with pytest.raises(StorageError):
        download(server, tmp_path, "a", retries=0)
    server.files["a"] = DATA[::-1]
    server.cut_after, server.minds_if_range = [], False
    download(server, tmp_path, "a")
    assert (tmp_path / "a").read_bytes() == DATA[::-1]


@pytest.mark.parametrize("lacks", ["ranges", "validator"])
def test_a_server_that_cannot_go_on_is_asked_from_the_start(server, tmp_path, lacks):
    server.files["a"] = DATA
    server.cut_after = [200_000]
    if lacks == "ranges":
        server.knows_ranges = False
    else:
        server.validator = ""
    download(server, tmp_path, "a")
    assert (tmp_path / "a").read_bytes() == DATA
    assert len(server.asked) == 2


def test_with_a_digest_no_word_of_the_server_is_needed_to_go_on(server, tmp_path):
    server.files["a"] = DATA
    server.cut_after = [200_000]
    server.validator = ""
    download(server, tmp_path, "a", sha256={"a": hashlib.sha256(DATA).hexdigest()})
    assert (tmp_path / "a").read_bytes() == DATA
    assert server.asked == [("a", None), ("a", "bytes=200000-")]


def test_a_part_that_is_whole_already_gets_its_name(server, tmp_path):
    server.files["a"] = DATA
    etag = f'"{hashlib.md5(DATA).hexdigest()}"'
    (tmp_path / ".a.part").write_bytes(DATA)
    note = {"url": f"{server.url}/a", "total": len(DATA), "validator": etag}
    (tmp_path / ".a.part.json").write_text(json.dumps(note))
    download(server, tmp_path, "a")
    assert server.asked == [("a", f"bytes={len(DATA)}-")]
    assert (tmp_path / "a").read_bytes() == DATA and hidden(tmp_path) == []


def test_a_part_of_which_nobody_knows_what_it_is_is_not_used(server, tmp_path):
    server.files["a"] = DATA
    (tmp_path / ".a.part").write_bytes(b"something else")
    download(server, tmp_path, "a")
    assert server.asked == [("a", None)] and (tmp_path / "a").read_bytes() == DATA


def test_without_a_length_only_a_digest_can_tell_that_all_came(server, tmp_path):
    server.files["a"] = DATA
    server.says_length = False
    with pytest.raises(StorageError, match="does not say how long"):
        download(server, tmp_path, "a")
    download(server, tmp_path, "a", sha256={"a": hashlib.sha256(DATA).hexdigest()})
    assert (tmp_path / "a").read_bytes() == DATA
    server.files["empty"] = b""
    server.says_length = True
    download(server, tmp_path, "empty")
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_kill_between_the_note_and_the_bytes_mixes_no_two_files(server, tmp_path, monkeypatch):
    server.files["a"] = DATA
    server.cut_after = [200_000, 0]
    with pytest.raises(StorageError):
        download(server, tmp_path, "a", retries=0)
    server.files["a"] = DATA[::-1]
    server.cut_after = []

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(_download._File, "_take", killed)
        download(server, tmp_path, "a")
    download(server, tmp_path, "a")
    assert (tmp_path / "a").read_bytes() == DATA[::-1]


def test_a_digest_that_does_not_fit_is_an_error_and_leaves_nothing(server, tmp_path):
    server.files["a"] = DATA
    wrong = hashlib.sha256(b"other").hexdigest()
    with pytest.raises(CorruptCheckpoint, match=f"sha256 .*{wrong} was expected"):
        download(server, tmp_path, "a", sha256={"a": wrong})
    assert list(tmp_path.iterdir()) == []


def test_what_is_here_is_held_against_the_digests_too(server, tmp_path):
    server.files = {"a": DATA, "b": b"b"}
    (tmp_path / "a").write_bytes(DATA[:1000])  # as the original left it when it was interrupted
    (tmp_path / "b").write_bytes(b"b")
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(
        "".join(f"{hashlib.sha256(d).hexdigest()}  {n}\n" for n, d in server.files.items())
    )
    download(server, tmp_path, "a", "b", sha256=sums)
    assert [name for name, _ in server.asked] == ["a"]
    assert (tmp_path / "a").read_bytes() == DATA


@pytest.mark.parametrize("lacks", ["", "ranges", "everything", "length"])
def test_half_a_file_of_the_original_is_known_by_what_the_server_says(
    server, tmp_path, caplog, lacks
):
    server.files = {"a": DATA, "b": b"b", "c": b""}
    halves = {"a": DATA[:1000], "b": b"b", "c": b""}
    for name, data in halves.items():
        (tmp_path / name).write_bytes(data)
    server.knows_ranges, server.says_length = not lacks, lacks != "length"
    if lacks == "everything":
        server.answers = [(503, {})] * 9
    with caplog.at_level("WARNING"):
        download(server, tmp_path, *server.files, parallel=1)
    is_known = lacks in ("", "ranges")
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == (server.files if is_known else halves)
    said = [record.getMessage() for record in caplog.records]
    if is_known:
        assert len(said) == 1 and "a has 1000 bytes, and 307200 on the server" in said[0]
    else:
        assert len(said) == len(server.asked) == 1 and "is taken as it is" in said[0]


def test_what_is_no_byte_of_the_file_is_not_taken_for_one(server, tmp_path):
    server.files["a"] = DATA
    server.adds = {"Content-Encoding": "gzip"}
    with pytest.raises(StorageError, match="packs it"):
        download(server, tmp_path, "a")
    server.says_length, server.adds = False, {"Content-Length": "9" * 5000}
    with pytest.raises(StorageError, match="does not say how long"):
        download(server, tmp_path, "a")
    server.answers = [(206, {"Content-Range": f"bytes 0-9/{'9' * 5000}"})]
    with pytest.raises(StorageError):
        download(server, tmp_path, "a", retries=0)
    chunked = {"Content-Range": "bytes 0-9/*", "Transfer-Encoding": "chunked"}
    server.answers = [(206, chunked)]
    with pytest.raises(StorageError, match="does not say how long"):
        download(server, tmp_path, "a", retries=0)
    assert not (tmp_path / "a").exists()


def test_a_line_that_brings_no_more_than_it_did_before_is_given_up(server, tmp_path):
    server.files["a"], server.validator = DATA, ""
    server.cut_after = [500, 400, 500, 400, 500]
    with pytest.raises(StorageError):
        download(server, tmp_path, "a", retries=3)
    assert len(server.asked) == 4


def test_files_come_at_once(server, tmp_path):
    server.gate = threading.Barrier(3)  # answers only when three are asked for together
    server.files = {str(n): DATA[n:] for n in range(6)}
    download(server, tmp_path, *server.files, parallel=3)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == server.files


def test_a_file_that_is_not_there_is_an_error_at_once(server, tmp_path):
    with pytest.raises(OSError, match=r"/weights/no%20file: HTTP 404 .*Check the URL") as caught:
        download(server, tmp_path, "no file")
    assert isinstance(caught.value, StorageError) and len(server.asked) == 1


def test_a_busy_server_is_asked_again_when_it_says(server, tmp_path):
    server.files["a"] = b"a"
    server.answers = [(503, {}), (429, {"Retry-After": "0"}), (500, {})]
    download(server, tmp_path, "a", retries=3)
    assert len(server.asked) == 4 and (tmp_path / "a").read_bytes() == b"a"
    server.answers = [(503, {})] * 3
    with pytest.raises(StorageError, match="HTTP 503"):
        download(server, tmp_path, "b", retries=2)


def test_nobody_listening_is_an_error_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(_download, "_FIRST_WAIT", 0.01)
    with Server() as gone:
        url = gone.url
    with pytest.raises(StorageError, match=r"refused.*another base_url"):
        labml.download(base_url=url, to=tmp_path, files=["a"], retries=1)


def test_a_redirect_leads_to_no_file_of_this_machine(server, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    server.answers = [(302, {"Location": secret.as_uri()})]
    with pytest.raises(StorageError):
        download(server, tmp_path / "to", "a", retries=0)
    server.files["b"] = b"b"
    server.answers = [(302, {"Location": f"{server.url}/b"})]
    download(server, tmp_path / "to", "a")
    assert (tmp_path / "to/a").read_bytes() == b"b"


@pytest.mark.parametrize("name", ["../a", "/a", "", ".", "a/../../b", "a\\b", "\ud800", "a\nb"])
def test_a_name_that_leads_out_of_the_folder_is_refused(server, tmp_path, name):
    with pytest.raises(ConfigError, match="not the name of a file below"):
        download(server, tmp_path, name)
    assert server.asked == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_url": "file:///etc"}, "http:// or https://"),
        ({"base_url": "weights"}, "http:// or https://"),
        ({"parallel": 0}, "0 files at once"),
        ({"timeout": 0}, "timeout above 0"),
        ({"sha256": {"a": "abc"}}, "64 hexadecimal digits"),
        ({"sha256": {"b": "0" * 64}}, "none of the 1 files"),
    ],
)
def test_an_argument_without_sense_is_an_error(tmp_path, change, said):
    given = {"base_url": "http://127.0.0.1:9", "to": tmp_path, "files": ["a"], **change}
    with pytest.raises(ConfigError, match=said):
        labml.download(**given)


def test_a_full_disk_is_an_error_of_the_disk_and_is_not_tried_again(server, tmp_path, monkeypatch):
    server.files["a"] = DATA

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_download.os, "replace", full)
    with pytest.raises(StorageError, match=r"no space left on device\. Free some"):
        download(server, tmp_path, "a")
    assert len(server.asked) == 1 and not (tmp_path / "a").exists()


def test_a_killed_download_is_gone_on_with(server, tmp_path):
    server.files["a"] = DATA
    server.pause = 0.05
    code = (
        "from bioinit.compat.labml import download\n"
        f"download(base_url={server.url!r}, to={str(tmp_path)!r}, files=['a'])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    part = tmp_path / ".a.part"
    while not (part.exists() and part.stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "a").exists()
    have = part.stat().st_size
    assert 0 < have < len(DATA)
    server.pause = 0.0
    server.asked.clear()
    download(server, tmp_path, "a")
    assert server.asked == [("a", f"bytes={have}-")]
    assert (tmp_path / "a").read_bytes() == DATA and hidden(tmp_path) == []
