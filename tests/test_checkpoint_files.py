"""checkpoint_files.py: damaged checkpoints, and checkpoints of strangers, whose code must not run."""

import errno
import io
import json
import os
import pickle
import zlib
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata

from helpers import same_tensors
from nanofp8 import checkpoint_files, resuming
from nanofp8.checkpoint_files import (
    DamagedCheckpoint,
    checksums,
    find_damage,
    load_weights,
    next_whole,
    read_checkpoint,
    read_index,
    set_aside,
)
from nanofp8.config import UserError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

WEIGHTS = {"a.weight": torch.arange(4000.0).view(40, 100), "b.weight": torch.ones(30, dtype=torch.bfloat16),
           "c.weight": torch.tensor(2.0)}


def save(folder, weights=WEIGHTS, step=4, **changes):
    """Save weights as a checkpoint with checksums, as one rank would."""
    dcp.save({"model": dict(weights)}, checkpoint_id=str(folder), no_dist=True)
    files = checksums(str(folder), sorted(p.name for p in folder.iterdir() if p.suffix == ".distcp") + [".metadata"])
    meta = dict(step=step, tokens=256 * step, world_size=1, train_seconds=1.0, flags={"n_layer": 2}, files=files,
                loader=dict(step=step, micro_batch=0), saved_at=1.0) | changes
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "ckpt" / "step_000004")


def load(folder):
    """Load the weights into new tensors."""
    tensors = {name: torch.full_like(p, torch.nan) for name, p in WEIGHTS.items()}
    load_weights(str(folder), tensors)
    return tensors


def edit_index(folder, change):
    """Change a checkpoint's index in place. change: called with the Metadata; returns what to write (None: that)."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(index) or index))


# -----------------------------------------------------------------------------------------------------
# Checkpoints of strangers


class Evil:
    """Unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_whole_checkpoint_loads_as_dcp_loads_it(folder):
    assert same_tensors(load(folder), WEIGHTS) and find_damage(str(folder)) == ""
    index, trusted = read_index(str(folder)), dcp.FileSystemReader(str(folder)).read_metadata()
    assert index.state_dict_metadata == trusted.state_dict_metadata and index.storage_data == trusted.storage_data
    assert index.storage_meta.checkpoint_id == str(folder)  # text, where it was a path


def test_code_in_the_index_does_not_run(folder, tmp_path):
    """DCP's own reader runs it, which shows that this test would notice."""
    marker = tmp_path / "ran"
    edit_index(folder, lambda index: Evil(os.mkdir, str(marker)))
    with pytest.raises(Exception, match="storage_meta"):
        dcp.FileSystemReader(str(folder)).read_metadata()
    assert marker.exists()
    marker.rmdir()
    for attempt in (load, lambda folder: read_index(str(folder))):
        with pytest.raises(UserError, match=r"posix\.mkdir, which may run code"):
            attempt(folder)
    assert "posix.mkdir" in find_damage(str(folder)) and not marker.exists()


def test_a_weight_that_is_declared_as_bytes_does_not_run(folder, tmp_path):
    """DCP unpickles such an entry without weights_only."""
    marker, stream = tmp_path / "ran", io.BytesIO()
    torch.save(Evil(os.mkdir, str(marker)), stream)
    (folder / "__0_0.distcp").write_bytes(stream.getvalue())

    def declare(index):
        place = metadata.MetadataIndex("model.c.weight")
        index.state_dict_metadata["model.c.weight"] = metadata.BytesStorageMetadata()
        index.storage_data[place] = filesystem._StorageInfo("__0_0.distcp", 0, len(stream.getvalue()))

    edit_index(folder, declare)
    dcp.load({"model": {"c.weight": 0}}, checkpoint_id=str(folder), no_dist=True)
    assert marker.exists()
    marker.rmdir()
    with pytest.raises(UserError, match="BytesStorageMetadata, which may run code"):
        load(folder)
    assert not marker.exists()


def global_of(module, name):
    """Return a pickle that is one name."""
    return b"c" + f"{module}\n{name}\n".encode() + b"."


@pytest.mark.parametrize("module,name", [
    ("builtins", "eval"), ("torch", "load"), ("torch", "_C"), ("torch.hub", "load"),
    ("torch.serialization", "load"), ("pathlib", "Path"), ("copyreg", "_reconstructor"), ("functools", "partial"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"), ("numpy", "load"),
    ("torch.distributed.checkpoint.metadata", "Metadata.__init__"), ("torch.distributed.checkpoint.metadata", "os")])
def test_other_names_are_refused(folder, module, name):
    (folder / ".metadata").write_bytes(global_of(module, name))
    with pytest.raises(DamagedCheckpoint, match=f"it names {module}.{name}"):
        read_index(str(folder))


def test_what_an_index_may_name(folder):
    for module, name in [("torch", "Size"), ("torch", "float8_e4m3fn"), ("pathlib", "PosixPath"),
                         ("pathlib._local", "PosixPath"), ("torch.serialization", "_get_layout")]:
        assert checkpoint_files.IndexUnpickler(io.BytesIO(global_of(module, name))).load() is not None


def test_an_index_cannot_change_a_class(folder):
    """BUILD would set attributes of a class that all code in the process shares."""
    module = "torch.distributed.checkpoint.metadata"
    (folder / ".metadata").write_bytes(f"c{module}\nMetadata\n".encode() + b"(N}(Vversion\nVx\nutb.")
    with pytest.raises(DamagedCheckpoint, match="it changes a class"):
        read_index(str(folder))
    assert metadata.Metadata.version is None


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", ".", "", "sub/x", 7])
def test_files_outside_the_folder_are_refused(folder, name):
    (folder.parent / "x").write_bytes((folder / "__0_0.distcp").read_bytes())

    def rename(index):
        for info in index.storage_data.values():
            info.relative_path = name

    edit_index(folder, rename)
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata is damaged \("):
        read_index(str(folder))


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "meta.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_refused_at_once(folder, file, make):
    """Opening a pipe would wait for a writer; /dev/zero never ends."""
    (folder / file).unlink()
    make(folder / file)
    assert "is not a regular file" in find_damage(str(folder))


def test_parts_that_are_missing_are_refused(folder):
    """Else the rest of a tensor would keep what was in its memory."""
    def shorten(index):
        index.state_dict_metadata["model.a.weight"].chunks[0].sizes = torch.Size([20, 100])

    edit_index(folder, shorten)
    with pytest.raises(DamagedCheckpoint, match="parts of 'model.a.weight' are missing"):
        read_index(str(folder))


@pytest.mark.parametrize("change", [
    lambda index: {"not": "ours"}, lambda index: index.state_dict_metadata.update({"model.b": 3}),
    lambda index: setattr(index, "storage_data", None), lambda index: index.storage_data.update({"x": "y"}),
    lambda index: [setattr(info, "offset", -1) for info in index.storage_data.values()] and None,
    lambda index: [setattr(info, "length", 1.5) for info in index.storage_data.values()] and None,
    lambda index: [setattr(info, "transform_descriptors", ["zstd"]) for info in index.storage_data.values()] and None])
def test_an_index_of_another_format_is_refused(folder, change):
    edit_index(folder, change)
    with pytest.raises(DamagedCheckpoint, match=r"\.metadata is damaged \("):
        read_index(str(folder))


# -----------------------------------------------------------------------------------------------------
# meta.json


@pytest.mark.parametrize("flags,word", [
    (dict(n_head=3, n_embd=32), "n_head=3"), (dict(rope_base="10000"), "rope_base is '10000'"),
    (dict(n_layer=0), "n_layer"), (dict(n_layer=True), "n_layer"), (dict(n_layer=2.0), "n_layer"),
    (dict(norm_eps=float("nan")), "norm_eps"), (dict(rope_base=float("inf")), "rope_base"),
    (dict(window_pattern="X"), "window_pattern"), (dict(USE_X0=1), "USE_X0"), (dict(run_name="../x"), "run_name"),
    (dict(vocab_size=[1]), "vocab_size"), (dict(dataset=None), "dataset")])
def test_flags_of_another_type_are_refused(folder, flags, word):
    meta = read_checkpoint(str(folder))
    (folder / "meta.json").write_text(json.dumps(meta | dict(flags=flags)))
    with pytest.raises(DamagedCheckpoint, match=word):
        read_checkpoint(str(folder))


@pytest.mark.parametrize("changes", [
    dict(guard=3), dict(guard=dict(in_a_row=0, windows=dict(loss="x"))), dict(data={}), dict(files=[]),
    dict(files={"../x": dict(bytes=1, crc32="")}), dict(files={"x": dict(bytes="1", crc32="")}), dict(muon="other"),
    dict(muon_momentum=1), dict(loader=dict(step=-1, micro_batch=0)), dict(flags=[]), dict(step=True),
    dict(train_seconds="1")])
def test_fields_of_another_type_are_refused(folder, changes):
    (folder / "meta.json").write_text(json.dumps(read_checkpoint(str(folder)) | changes))
    with pytest.raises(DamagedCheckpoint, match="not a complete checkpoint"):
        read_checkpoint(str(folder))


def test_deeply_nested_json_is_refused(folder):
    (folder / "meta.json").write_text("[" * 100_000)
    with pytest.raises(DamagedCheckpoint, match="RecursionError"):
        read_checkpoint(str(folder))


# -----------------------------------------------------------------------------------------------------
# Damage


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_a_flipped_bit_is_found_wherever_it_is(folder, file, monkeypatch):
    """In every block of a file, also in its last, shorter one; and by exactly one of the ranks that share the work."""
    path, whole = folder / file, (folder / file).read_bytes()
    monkeypatch.setattr(checkpoint_files, "BLOCK", 2 ** 22)  # one read; then smaller ones
    files = read_checkpoint(str(folder))["files"]
    assert files[file]["crc32"] == f"{zlib.crc32(whole):08x}"
    for position in (0, 5000, len(whole) - 1) if file != ".metadata" else (len(whole) // 2,):
        for bit in (1, 128):
            damaged = bytearray(whole)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            fault = find_damage(str(folder), weights=False)
            assert str(path) in fault and "damaged" in fault
            if file != ".metadata":
                shares = [find_damage(str(folder), rank, 3, weights=False) for rank in range(3)]
                assert sum(map(bool, shares)) == 1
    path.write_bytes(whole)
    assert find_damage(str(folder)) == ""


def test_files_of_many_blocks(tmp_path, monkeypatch):
    """Each block has a checksum of its own, so that ranks and threads can share one large file."""
    monkeypatch.setattr(checkpoint_files, "BLOCK", 2 ** 22)
    folder = save(tmp_path / "step_000004", {"a": torch.zeros(3 * 2 ** 20 + 5)})
    path = folder / "__0_0.distcp"
    crcs = read_checkpoint(str(folder))["files"]["__0_0.distcp"]["crc32"].split()
    assert len(crcs) == 4 and crcs[1] == f"{zlib.crc32(path.read_bytes()[2 ** 22:2 ** 23]):08x}"
    with open(path, "r+b") as f:
        f.seek(2 ** 23 + 9)
        f.write(b"x")
    assert [bool(find_damage(str(folder), rank, 4, weights=False)) for rank in range(4)].count(True) == 1
    with mock.patch.object(checkpoint_files, "block_checksum", side_effect=lambda path, i: crcs[i]) as read:
        find_damage(str(folder), 1, 2, weights=False)
    assert read.call_count == 2  # of five blocks, with that of the index


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "meta.json"])
@pytest.mark.parametrize("size", [0, 100, None])
def test_missing_and_short_files_are_found(folder, file, size):
    """Also without checksums, as older code saved: the index says how long the files must be."""
    for with_checksums in (True, False):
        if not with_checksums:
            save(folder, files=None)
        whole = (folder / file).read_bytes()
        (folder / file).unlink()
        if size is not None:
            (folder / file).write_bytes(whole[:size])
        assert file in find_damage(str(folder), weights=False)
        (folder / file).write_bytes(whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_found(tmp_path, value):
    """By the rank whose share they are."""
    weights = WEIGHTS | {"b.weight": torch.tensor([1.0, value], dtype=torch.bfloat16)}
    folder = save(tmp_path / "step_000004", weights)
    assert find_damage(str(folder)).endswith("holds weights that are not finite (b.weight)")
    assert [bool(find_damage(str(folder), rank, 3)) for rank in range(3)].count(True) == 1
    assert find_damage(str(folder), weights=False) == ""


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "Denied"),
                                   MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_what_is_not_the_checkpoints_fault_is_no_damage(folder, error):
    """No other checkpoint is tried then."""
    with mock.patch.object(torch, "load", side_effect=error), pytest.raises(UserError) as raised:
        find_damage(str(folder))
    assert not isinstance(raised.value, DamagedCheckpoint)
    if isinstance(error, OSError):
        assert "__0_0.distcp cannot be read" in str(raised.value) and error.strerror in str(raised.value)
        for target in ("block_checksum", "read_index"):
            with mock.patch.object(checkpoint_files, target, side_effect=checkpoint_files.read_error("x", error)), \
                    pytest.raises(UserError, match="x cannot be read"):
                find_damage(str(folder))


def test_an_error_while_loading_names_the_file(folder):
    with mock.patch.object(torch, "load", side_effect=OSError(errno.EIO, "Input/output error")), \
            pytest.raises(UserError, match=r"step_000004: __0_0.distcp cannot be read \(Input/output error\)"):
        load(folder)


def test_next_whole_and_set_aside(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path / f"step_{step:06d}", step=step)
    (tmp_path / "step_000003" / "__0_0.distcp").unlink()
    newest = str(tmp_path / "step_000004")
    assert next_whole(newest) == str(tmp_path / "step_000002")
    assert next_whole(str(tmp_path / "step_000001")) == next_whole(str(tmp_path / "moved")) == ""
    names = []
    for _ in range(2):
        names.append(os.path.basename(set_aside(newest)))
        save(tmp_path / "step_000004")
    assert names == ["step_000004.damaged", "step_000004.damaged-2"] and set(names) < set(os.listdir(tmp_path))
    assert [os.path.basename(f) for f in checkpoint_files.complete_checkpoints(str(tmp_path))] == [
        f"step_{step:06d}" for step in (1, 2, 3, 4)]


class Attribute:
    """Pickled as a call of getattr, as some versions of Python 3.11 pickle a member of an enumeration."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_getattr_of_an_enumerations_member_only():
    kind = metadata._MEM_FORMAT_ENCODING
    member = next(iter(kind))
    data = pickle.dumps(Attribute(kind, member.name))
    assert checkpoint_files.IndexUnpickler(io.BytesIO(data)).load() is member
    for owner, name in ((kind, "mro"), (kind, "__class__"), (metadata.Metadata, "__init__")):
        with pytest.raises(pickle.UnpicklingError, match="getattr"):
            checkpoint_files.IndexUnpickler(io.BytesIO(pickle.dumps(Attribute(owner, name)))).load()


def test_a_checkpoint_that_cannot_be_seen_counts_as_complete(tmp_path, monkeypatch):
    """Else an older one would be taken in its place, and this one be deleted as half written."""
    stat, hidden = os.stat, str(tmp_path / "step_000002" / "meta.json")

    def refuse(path, *args, **options):
        if str(path) == hidden:
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, *args, **options)

    for name in ("step_000001", "step_000002", "step_000003"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_000001" / "meta.json").write_text("{}")
    monkeypatch.setattr(os, "stat", refuse)
    found = checkpoint_files.complete_checkpoints(str(tmp_path))
    assert [os.path.basename(f) for f in found] == ["step_000001", "step_000002"]
    assert resuming.find_checkpoint(os.path.dirname(hidden)) == os.path.dirname(hidden)  # so its reader names the cause
