"""shards.py: the token shard format."""

import importlib.util
import os
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

from helpers import shard_bytes
from nanofp8 import shards
from nanofp8.shards import ShardError, find_shards, fingerprint, open_shard, read_token_count, write_shard


def test_write_shard_has_the_published_layout(tmp_path):
    path = tmp_path / "x_train_000001.bin"
    write_shard(path, [50256, 15496, 995])
    assert path.read_bytes() == shard_bytes([50256, 15496, 995])
    assert path.stat().st_size == 1024 + 2 * 3
    assert read_token_count(path) == 3
    assert open_shard(path).tolist() == [50256, 15496, 995]
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary file stays


def test_shards_are_found_and_measured_without_numpy(tmp_path, monkeypatch):
    """train.py --doctor does it before anything is installed."""
    path = tmp_path / "x_train_000001.bin"
    write_shard(path, [50256, 15496, 995])
    monkeypatch.setitem(sys.modules, "numpy", None)
    spec = importlib.util.spec_from_file_location("shards_alone", shards.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.find_shards(tmp_path, "train") == ([str(path)], []) and alone.read_token_count(path) == 3
    with pytest.raises(alone.ShardError, match="no val shards"):
        alone.find_shards(tmp_path, "val")


@pytest.mark.parametrize("hard", [200, 60])
def test_more_shards_than_files_may_be_open(tmp_path, hard):
    """Each shard that is read stays open. A process may raise its limit up to the hard one."""
    path = tmp_path / "x_train_000001.bin"
    write_shard(path, [1, 2, 3])
    code = ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, int(sys.argv[1])))\n"
            "from nanofp8.shards import Shard\n"
            "try: print(sum(len(shard) for shard in [Shard(sys.argv[2]) for _ in range(100)]))\n"
            "except ValueError as error: print(error)")
    result = subprocess.run([sys.executable, "-c", "import sys; " + code, str(hard), str(path)], cwd=shards.PROJECT,
                            capture_output=True, text=True)
    assert result.stdout.strip() == "300" if hard == 200 else "ulimit -n" in result.stdout, result


@pytest.mark.parametrize("tokens", [[], [-1], [65536], [0.5], [[1, 2]]])
def test_write_shard_refuses(tmp_path, tokens):
    with pytest.raises(ValueError, match="x.bin"):
        write_shard(tmp_path / "x.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_write_shard_refuses_more_tokens_than_its_header_can_say(tmp_path):
    tokens = np.broadcast_to(np.uint16(1), 2**31)  # takes no memory
    with pytest.raises(ValueError, match="x.bin.*2,147,483,647.*2,147,483,648"):
        write_shard(tmp_path / "x.bin", tokens)
    assert not list(tmp_path.iterdir())


def test_write_shard_that_fails_leaves_the_old_shard(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    write_shard(path, [1, 2, 3])

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError):
        write_shard(path, [4, 5, 6, 7])
    assert open_shard(path).tolist() == [1, 2, 3]


BAD_SHARDS = {  # content, and what the message says of it
    "missing": (None, "No such file"),
    "empty": (b"", "0 bytes"),
    "short header": (shard_bytes([1, 2])[:500], "500 bytes"),
    "header alone": (shard_bytes([1, 2])[:1024], "truncated"),
    "truncated": (shard_bytes(range(100))[:-7], "truncated"),
    "too long": (shard_bytes([1, 2]) + b"\0\0", "too long"),
    "wrong magic": (shard_bytes([1, 2], magic=20240801), "20240801"),
    "wrong version": (shard_bytes([1, 2], version=2), "version 2"),
    "no tokens": (shard_bytes([]), "no tokens"),
    "negative count": (shard_bytes([1, 2], count=-2), "-2"),
    "not a shard": (b"<!doctype html>" * 200, "magic"),
}


def test_a_shard_without_permission_is_not_to_be_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(ShardError, match="Permission denied.*check the disk and the file's permissions"):
        read_token_count(tmp_path / "s_train_000001.bin")


@pytest.mark.parametrize("name, remedy", [("loop", "correct the link.*--data_dir"), ("x" * 300, "choose another")])
def test_a_folder_whose_name_leads_nowhere(tmp_path, name, remedy):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ShardError, match=f"cannot be read.*{remedy}") as caught:
        find_shards(str(tmp_path / name), "train")
    assert "permissions" not in str(caught.value)
    with pytest.raises(ShardError, match="cannot be read.*correct the link"):
        read_token_count(tmp_path / "loop")


@pytest.mark.parametrize("broken", ["os.listdir", "builtins.open"])  # open: the folder may be listed, but not entered
@pytest.mark.parametrize("error, remedy", [(PermissionError(13, "Permission denied"), "correct its permissions"),
                                           (OSError(5, "Input/output error"), "check the disk")])
def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch, broken, error, remedy):
    monkeypatch.setattr(broken, mock.Mock(side_effect=error))
    with pytest.raises(ShardError, match=f"{error.strerror}.*{remedy}"):
        find_shards(str(tmp_path), "train")


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_broken_shard_names_file_fault_and_remedy(tmp_path, name):
    content, fault = BAD_SHARDS[name]
    path = tmp_path / "fineweb_train_000001.bin"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ShardError) as caught:
        read_token_count(path)
    message = str(caught.value)
    assert str(path) in message and fault in message and "data/README.md" in message and "\n" not in message
    assert fault in caught.value.fault and "data/README.md" not in caught.value.fault


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_shard(tmp_path):
    """Reading it would wait for ever."""
    os.mkfifo(tmp_path / "a_train_000001.bin")
    with pytest.raises(ShardError, match="a_train_000001.bin is not a file, but a pipe"):
        read_token_count(tmp_path / "a_train_000001.bin")


def test_read_token_count_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_token_count(tmp_path)


@pytest.mark.parametrize("whole", [True, False])
def test_fingerprint(tmp_path, monkeypatch, whole):
    """A small file is read whole. Of a large one: its ends and samples spread over it."""
    if not whole:
        for name, value in dict(WHOLE_BYTES=1000, ENDS_BYTES=2000, SAMPLES=9, SAMPLE_BYTES=40).items():
            monkeypatch.setattr(shards, name, value)
    path = tmp_path / "x_train_000001.bin"
    write_shard(path, list(range(10_000)))
    before, content, seen = fingerprint(path), path.read_bytes(), set()
    assert before == fingerprint(path) and before["name"] == path.name and before["bytes"] == 1024 + 20_000
    for position in range(0, len(content), 20):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1:])
        now = fingerprint(path)
        assert now["bytes"] == before["bytes"]
        if now["crc32"] != before["crc32"]:
            seen.add(position)
    positions = set(range(0, len(content), 20))
    if whole:
        assert seen == positions
    else:  # the ends, and 2 of every (21024 - 40) / 8 bytes
        assert {p for p in positions if p < 2000 or p >= len(content) - 2000} < seen
        middle = sorted(p for p in seen if 2000 <= p < len(content) - 2000)
        assert len(middle) == 14 and max(b - a for a, b in zip(middle, middle[1:], strict=False)) < 2700
    path.write_bytes(content + b"xx")
    assert fingerprint(path) != before
    path.unlink()
    with pytest.raises(ShardError, match="cannot be read"):
        fingerprint(path)
