"""files.py: files that are written whole or not at all, and error messages of one line."""

import errno
import io
import os
import subprocess
import sys
import textwrap
import time

import pytest

import helpers
from nanofp8.files import console, error_line, is_seen, replace_file, sync_to_disk


def write(text):
    """A function for replace_file() that writes this text."""
    def do(temporary):
        with open(temporary, "w") as f:
            f.write(text)
    return do


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_is_replaced(tmp_path, sync):
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        replace_file(path, write(text), sync)
        assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_relative_name_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    replace_file("a.txt", write("text"), sync=True)
    assert (tmp_path / "a.txt").read_text() == "text"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(temporary):
        write("half")(temporary)
        raise error

    with pytest.raises(type(error)):
        replace_file(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_what_an_interrupted_attempt_left_is_overwritten(tmp_path):
    (tmp_path / "a.txt.tmp").write_text("half of an earlier attempt")
    replace_file(tmp_path / "a.txt", write("new"))
    assert (tmp_path / "a.txt").read_text() == "new" and len(os.listdir(tmp_path)) == 1


def test_sync_to_disk_of_files_and_folders(tmp_path):
    (tmp_path / "a").write_text("a")
    sync_to_disk(str(tmp_path / "a"))
    sync_to_disk(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        sync_to_disk(str(tmp_path / "b"))


@pytest.mark.parametrize("error,line", [
    (ValueError("one line"), "one line"), (RuntimeError("first\n  second\n\n"), "  second"), (KeyError(), "KeyError"),
    (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    (RuntimeError("ncclSystemError: call failed. \nLast error:\n"), "ncclSystemError: call failed."),
    (RuntimeError("ncclUnhandledCudaError: failed.\nLast error:\nno device"), "no device"),
    (RuntimeError("EADDRINUSE\nException raised from f at x.cpp:9 (most recent call first):\n#0 f()"), "EADDRINUSE"),
    (RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`.\n"), "CUDA error: out of memory"),
])
def test_error_line(error, line):
    assert error_line(error) == line.strip() or error_line(error) == line


@pytest.mark.parametrize("number,passes", [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch, number, passes):
    """Some network file systems cannot sync a folder; a disk that fails is another matter, and so is a file."""
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if passes:
        sync_to_disk(str(tmp_path))
    else:
        with pytest.raises(OSError):
            sync_to_disk(str(tmp_path))
    (tmp_path / "a").write_text("a")
    with pytest.raises(OSError):
        sync_to_disk(str(tmp_path / "a"))


def test_a_file_that_is_seen_late(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: (tmp_path / "late").touch())
    assert is_seen(str(tmp_path)) and is_seen(str(tmp_path / "late")) and not is_seen(str(tmp_path / "never"), 0)


def test_a_console_that_works(capsys):
    console("a", 1)
    assert capsys.readouterr().out == "a 1\n"


@pytest.mark.parametrize("out", ["pipe", "/dev/full", "closed"])
def test_a_console_that_cannot_be_written_ends_nothing(tmp_path, out):
    """A reader that has gone (| head), a full disk, a closed stdout: the script goes on to its end, without noise."""
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(helpers.ROOT)!r})
        from nanofp8.files import console
        if {out!r} == "closed":
            sys.stdout.close()
        for i in range(1000):
            console("a line that nobody reads", i)
        open("end", "w").close()
    """)
    if out == "pipe":
        read, write_end = os.pipe()
        os.close(read)
    else:
        write_end = os.open("/dev/full" if out == "/dev/full" else os.devnull, os.O_WRONLY)
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, stdout=write_end, stderr=subprocess.PIPE,
                            text=True)
    os.close(write_end)
    assert (result.returncode, result.stderr) == (0, "") and (tmp_path / "end").exists(), result


def test_console_prints_what_its_encoding_lacks_as_codes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console("run folder: out/é", 1)
    console("next")
    assert raw.getvalue() == b"run folder: out/\\xe9 1\nnext\n"
