"""TokenRing and DataLoader: which tokens are read, in which order, by which rank; bad shards."""

import os
import threading
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import helpers
import train
from helpers import shard_bytes, write_shard
from nanofp8.config import UserError
from nanofp8.runlog import data_rows
from nanofp8.shards import how_to_get

pytestmark = pytest.mark.usefixtures("fresh")
SIZES = (700, 1, 411, 93)  # 1205 tokens, one shard of a single token; no multiple of anything below
TOTAL = sum(SIZES)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Write a data folder whose ring holds the tokens 0, 1, 2, ...: a token is its own position."""
    folder, start = tmp_path_factory.mktemp("numbered"), 0
    for i, size in enumerate(SIZES):
        write_shard(folder / "n" / f"n_train_{i + 1:06d}.bin", np.arange(start, start + size))
        start += size
    write_shard(folder / "n" / "n_val_000000.bin", np.arange(5000, 5100))
    return folder


def ring_of(folder, need=10, vocab=65536, split="train", dataset="n"):
    return train.TokenRing(str(folder), dataset, split, vocab, need)


def loader_of(ring, rank=0, world=1, B=2, T=8, G=96, shuffle=False, max_iters=10**6, ramp=""):
    cfg = SimpleNamespace(batch_size=B, block_size=T, total_batch_size=G, max_iters=max_iters, batch_ramp=ramp,
                          USE_SHUFFLE=shuffle)
    return train.DataLoader(ring, cfg, helpers.one_process(rank, world))


def ring_positions(start, count):
    return (np.arange(start, start + count)) % TOTAL


# -----------------------------------------------------------------------------------------------------
# Order


def test_the_splits_are_apart_and_shards_follow_by_name(numbered):
    ring = ring_of(numbered)
    assert ring.total == TOTAL and [os.path.basename(p) for p in ring.paths] == [
        f"n_train_{i:06d}.bin" for i in range(1, 1 + len(SIZES))]
    assert ring_of(numbered, split="val").read(0, 3).tolist() == [5000, 5001, 5002]


@pytest.mark.parametrize("start,count",
                         [(0, 10), (695, 30), (700, 1), (701, 1), (1200, 20), (1205, 5), (3 * 1205 - 1, 2),
                                         (0, 1205), (1000, 3000), (10**12 * 1205 + 7, 3)])
def test_the_ring_across_shards_and_around(numbered, start, count):
    tokens = ring_of(numbered).read(start, count)
    assert tokens.dtype == np.int32 and np.array_equal(tokens, ring_positions(start, count))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("B,T", [(1, 8), (2, 8), (4, 8), (1, 32), (2, 16)])
def test_every_step_reads_its_own_tokens_once_for_any_ranks_and_batch_size(numbered, world, B, T):
    """Step k: tokens k*G to (k+1)*G as inputs, one further as targets, each exactly once over ranks and micro-batches.

    15 steps of 192 tokens go around the ring of 1205 twice, across every shard boundary.
    """
    G = 192
    loaders = [loader_of(ring_of(numbered), rank, world, B, T, G) for rank in range(world)]
    accumulation = G // (world * B * T)
    for loader in loaders:
        assert loader.accumulation == accumulation
    for step in range(15):
        inputs, targets = [], []
        for _ in range(accumulation):
            for loader in loaders:
                x, y = loader.next()
                assert x.shape == y.shape == (B, T) and x.dtype == torch.int32 and y.dtype == torch.int64
                inputs.append(x.flatten())
                targets.append(y.flatten())
        # In the order of micro-batches, then ranks, they even lie end to end
        assert np.array_equal(torch.cat(inputs), ring_positions(step * G, G))
        assert np.array_equal(torch.cat(targets), ring_positions(step * G + 1, G))
    for loader in loaders:
        loader.close()


def read_steps(folder, steps, world=1, B=2, T=8, G=96, first=0, **flags):
    """Return the inputs (steps, G / T, T) that all ranks read from step `first` on. Targets are checked."""
    loaders = [loader_of(ring_of(folder), rank, world, B, T, G, **flags) for rank in range(world)]
    for loader in loaders:
        loader.start_step(first)
    inputs = []
    for _ in range(steps * loaders[0].accumulation):
        for loader in loaders:
            x, y = loader.next()
            assert torch.equal(y, x.long() + 1)  # a token is its position: a sequence never comes round the ring's end
            inputs.append(x)
    for loader in loaders:
        loader.close()
    return torch.cat(inputs).view(steps, -1, T)


@pytest.mark.parametrize("world,B", [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_steps_of_a_growing_batch_read_the_next_tokens_for_any_ranks_and_batch_size(numbered, world, B):
    """4 steps of 48 tokens, 2 of 96, 4 of 192; a loader that is sent to a step goes on there."""
    ranks = range(world)
    loaders = [loader_of(ring_of(numbered), rank, world, B, G=192, max_iters=10, ramp="0.15,0.4") for rank in ranks]
    sizes, at = [48] * 4 + [96] * 2 + [192] * 4, 0
    for step, size in enumerate(sizes):
        for loader in loaders:
            loader.start_step(step)
        assert loaders[0].plan.tokens(step) == at
        accumulation, weight = loaders[0].accumulation, loaders[0].loss_weight
        assert weight == 1 / (size // world) and accumulation * world * B * 8 == size
        inputs = [loader.next()[0].flatten() for _ in range(accumulation) for loader in loaders]
        assert np.array_equal(torch.cat(inputs), ring_positions(at, size))
        at += size
    for step in (4, 6, 7):  # the first steps of two stages, and another
        for loader in loaders:
            loader.start_step(step)
        assert loaders[0].accumulation * world * B * 8 == sizes[step]
        first = torch.cat([loader.next()[0].flatten() for loader in loaders])
        assert np.array_equal(first, ring_positions(sum(sizes[:step]), world * B * 8))
    for loader in loaders:
        loader.close()


SEQUENCES = (TOTAL - 1) // 8  # 150 of 8 tokens; with its last target, each lies in the ring


def test_later_epochs_are_shuffled(numbered):
    """25 steps of 96 tokens read 300 sequences: the first epoch in order, the second in another, each sequence once."""
    first, second = read_steps(numbered, 25, shuffle=True).view(2, SEQUENCES, 8)
    assert np.array_equal(first.flatten(), np.arange(SEQUENCES * 8))
    starts = second[:, 0].numpy()
    assert sorted(starts) == list(range(0, SEQUENCES * 8, 8))
    assert np.array_equal(second - second[:, :1], [range(8)] * SEQUENCES)
    assert (np.diff(starts) == 8).mean() < 0.05


def test_each_epoch_has_its_own_order_which_never_changes():
    orders = [train.epoch_order(number, SEQUENCES) for number in (1, 2, 3)]
    assert not any(np.array_equal(a, b) for a, b in zip(orders, orders[1:], strict=False))
    assert train.epoch_order(1, 8).tolist() == [7, 2, 1, 6, 0, 4, 3, 5]  # a resumed run depends on it


@pytest.mark.parametrize("world, B", [(1, 1), (1, 4), (2, 2), (3, 4)])
def test_shuffled_steps_are_the_same_for_any_ranks_and_batch_size(numbered, world, B):
    """12.5 steps are an epoch: the 13th and 26th step lie in two."""
    expected = read_steps(numbered, 30, shuffle=True)
    assert torch.equal(read_steps(numbered, 30, world, B, shuffle=True), expected)
    assert torch.equal(read_steps(numbered, 3, world, B, shuffle=True, first=25), expected[25:28])  # resumed


def test_peek_shows_what_next_gives_and_moves_nothing(numbered):
    loader = loader_of(ring_of(numbered))
    for _ in range(8):  # before the thread runs, and while it is ahead
        peeked, again, given = loader.peek(), loader.peek(), loader.next()
        for a, b, c in zip(peeked, again, given, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
    loader.close()


# -----------------------------------------------------------------------------------------------------
# Position


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 7, 13])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_begins_at_its_own_tokens_whatever_was_taken_or_prefetched(numbered, taken, rank):
    """A loader from which any number of micro-batches was taken (6 a step for B=1), with a full prefetch queue behind
    it, is sent to the step in which it is, to the next one, and back to the first."""
    make = lambda: loader_of(ring_of(numbered), rank, world=2, B=1)  # noqa: E731
    loader = make()
    for _ in range(taken):
        loader.next()
    if taken:  # let the thread fill the queue
        deadline = time.time() + 5
        while not loader.prefetcher.items.full() and time.time() < deadline:
            time.sleep(0.01)
        assert loader.prefetcher.items.full()
    everything = make()
    expected = [everything.next() for _ in range(36)]
    everything.close()
    for step in (taken // 6, taken // 6 + 1, 0):
        for other in (make(), loader):
            other.start_step(step)
            for x, y in expected[6 * step:6 * step + 9]:
                x2, y2 = other.next()
                assert torch.equal(x, x2) and torch.equal(y, y2)
            if other is not loader:
                other.close()
    loader.close()


def test_a_step_boundary_restores_under_another_number_of_ranks(numbered):
    """At a step boundary the position is the same for any world size and micro-batch."""
    parts = []
    for rank in range(3):
        loader = loader_of(ring_of(numbered), rank, world=3, B=4)
        loader.start_step(2)
        parts.append(loader.next()[0].flatten())
        loader.close()
    assert np.array_equal(torch.cat(parts), ring_positions(2 * 96, 96))


def test_close_ends_the_thread_and_next_starts_another(numbered):
    before = threading.active_count()
    loader = loader_of(ring_of(numbered))
    x, _ = loader.next()
    assert threading.active_count() == before + 1
    loader.close()
    loader.close()
    assert threading.active_count() == before
    assert loader.next()[0][0, 0] == x[-1, -1] + 1
    loader.close()


def test_an_error_in_the_loader_thread_comes_out_of_next(numbered):
    """The error comes after the micro-batches before it. A second call does not wait for a thread that has ended."""
    loader = loader_of(ring_of(numbered, vocab=40))  # tokens 0 ... 1204: the third micro-batch of 16 + 1 holds 40
    loader.next()
    loader.next()
    with pytest.raises(UserError, match="n_train_000001.bin.*vocab_size is 40"):
        loader.next()
    again = []

    def call():
        try:
            loader.next()
        except Exception as error:
            again.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout=3)
    assert again and isinstance(again[0], UserError)
    loader.close()


# -----------------------------------------------------------------------------------------------------
# Bad shards


def bad_line(folder, **options):
    """The UserError of opening and reading a whole ring, in one line."""
    with pytest.raises(UserError) as caught:
        ring = ring_of(folder, **options)
        ring.read(0, ring.total)
    assert "\n" not in str(caught.value) and caught.value.status == 1
    return str(caught.value)


TOKENS = np.arange(100)
GOOD = shard_bytes(TOKENS)


@pytest.mark.parametrize("content,words", [
    (b"", ["0 bytes", "header"]),
    (GOOD[:1000], ["1000 bytes", "header"]),
    (GOOD[:-2], ["1222 bytes", "1224"]),
    (GOOD[:-1], ["1223 bytes", "1224"]),
    (GOOD + b"\0\0", ["1226 bytes", "1224"]),
    (shard_bytes(TOKENS, count=50), ["50 tokens"]),
    (shard_bytes(TOKENS, count=-5), ["no tokens", "-5"]),
    (shard_bytes(TOKENS, magic=20240521), ["magic", "20240521", "20240520"]),
    (shard_bytes(TOKENS, version=2), ["version 2", "expected 1"]),
    (shard_bytes([]), ["no tokens"]),
    (b"<html>not found</html>" * 100, ["magic", "20240520"]),
], ids=["empty", "half a header", "short by a token", "short by a byte", "too long", "header says less",
        "negative count",
        "magic", "version", "no tokens", "a web page"])
def test_a_bad_shard_is_one_line_with_file_and_remedy(tmp_path, content, words):
    (tmp_path / "n").mkdir()
    (tmp_path / "n" / "n_train_000001.bin").write_bytes(GOOD)
    bad = tmp_path / "n" / "n_train_000002.bin"
    bad.write_bytes(content)
    line = bad_line(tmp_path)
    for word in [str(bad), "delete it", "data/README.md", *words]:
        assert word in line


def test_a_link_to_nowhere_and_a_folder_are_bad_shards_too(tmp_path):
    (tmp_path / "n").mkdir()
    bad = tmp_path / "n" / "n_train_000001.bin"
    bad.symlink_to(tmp_path / "gone.bin")
    assert str(bad) in bad_line(tmp_path)
    bad.unlink()
    bad.mkdir()
    assert str(bad) in bad_line(tmp_path)


@pytest.mark.parametrize("dataset,command", [
    ("fineweb10B", "python data/cachedfineweb10b.py 9"), ("shakespeare", "python data/shakespeare/prepare.py"),
    ("openwebtext-1M", "python data/openwebtext-1M/prepare.py"),
])
@pytest.mark.parametrize("folder_exists", [False, True])
def test_missing_shards_name_the_command_that_brings_them(tmp_path, dataset, command, folder_exists):
    folder = tmp_path / "with space" / dataset
    if folder_exists:
        write_shard(folder / "x_val_000000.bin", TOKENS)  # the other split
    line = bad_line(folder.parent, dataset=dataset)
    for word in (str(folder), "no train shards", f"`{command} --out='{folder}'`", "--dataset", "--data_dir"):
        assert word in line
    in_project = how_to_get(os.path.join(helpers.ROOT, "data", dataset))
    assert f"`{command}`" in in_project  # the script writes there by itself


@pytest.mark.parametrize("dataset", ["mytext", "openwebtext", "..", "a/b"])
def test_missing_shards_name_no_script_that_does_not_exist(tmp_path, dataset):
    line = bad_line(tmp_path, dataset=dataset)
    assert "python" not in line and "prepare.py" not in line and "data/README.md" in line and "--dataset" in line


# -----------------------------------------------------------------------------------------------------
# Names of shards


@pytest.mark.parametrize("name", ["tiny_train_v2", "my_val_set", "x_train_000001", "train", "a_val_000000.bin", "n\n"])
def test_a_name_that_contains_a_splits_name(tmp_path, name):
    """The split is the last but one part of a file's name, whatever the data set is called."""
    write_shard(tmp_path / "n" / f"{name}_train_000001.bin", np.arange(100, 150))
    write_shard(tmp_path / "n" / f"{name}_val_000000.bin", np.arange(200, 250))
    for split, first in (("train", 100), ("val", 200)):
        ring = ring_of(tmp_path, split=split)
        assert ring.total == 50 and ring.read(0, 1) == [first] and ring.ignored == []


@pytest.mark.parametrize("name", ["n_train_000001 (1).bin", "n_train_1.bin", "n_train_0000001.bin", "n_train.bin",
                                  "train.bin", "n_TRAIN_000002.bin", "_train_000001.bin",
                                  f"n_train_{6 * chr(0x663)}.bin"])
def test_a_bin_of_another_name_is_not_read_and_is_named(tmp_path, name):
    for split in ("train", "val"):
        write_shard(tmp_path / "n" / f"n_{split}_000001.bin", TOKENS)
    write_shard(tmp_path / "n" / name, TOKENS)
    rings = [ring_of(tmp_path, split=split) for split in ("train", "val")]
    assert [ring.total for ring in rings] == [100, 100] and rings[0].ignored == [name]
    cfg = SimpleNamespace(batch_size=2, block_size=8, total_batch_size=96, max_iters=1, dataset="n", eval_tokens=64,
                          USE_SHUFFLE=True, auto=[])
    rows = dict(data_rows(cfg, helpers.one_process(), train.DataLoader(rings[0], cfg, helpers.one_process()), rings[1]))
    assert name in rows["  ignored"]


@pytest.mark.parametrize("steps, words", [(12, None), (13, "1.04 times"), (112, "8.92 times")])
@pytest.mark.parametrize("shuffle", [True, False])
def test_more_than_one_epoch_is_put_into_words(numbered, steps, words, shuffle):
    cfg = SimpleNamespace(batch_size=2, block_size=8, total_batch_size=96, max_iters=steps, dataset="n", eval_tokens=64,
                          auto=[])
    loader = loader_of(ring_of(numbered), shuffle=shuffle)
    length = dict(data_rows(cfg, helpers.one_process(), loader, ring_of(numbered, split="val")))["length"]
    assert words in length if words else "times" not in length
    assert ("shuffled" in length) == bool(words and shuffle)


def test_only_a_bin_of_another_name(tmp_path):
    write_shard(tmp_path / "n" / "train.bin", TOKENS)
    line = bad_line(tmp_path)
    assert "train.bin" in line and "<name>_{train,val}_NNNNNN.bin" in line and "rename" in line


def test_hidden_files_are_no_shards(tmp_path):
    """macOS leaves ._x beside x on foreign file systems, and downloads have hidden temporary files."""
    write_shard(tmp_path / "n" / "n_train_000001.bin", TOKENS)
    write_shard(tmp_path / "n" / "._n_train_000001.bin", TOKENS)
    ring = ring_of(tmp_path)
    assert ring.total == 100 and ring.ignored == []


@pytest.mark.parametrize("other", ["m_train_000002.bin", "m_val_000000.bin"])
def test_two_data_sets_in_one_folder(tmp_path, other):
    write_shard(tmp_path / "n" / "n_train_000001.bin", TOKENS)
    write_shard(tmp_path / "n" / other, TOKENS)
    line = bad_line(tmp_path)
    assert str(tmp_path / "n") in line and "(m, n)" in line and "folder of its own" in line


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def listdir(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "listdir", listdir)
    assert "Permission denied" in bad_line(tmp_path) and str(tmp_path / "n") in bad_line(tmp_path)


def test_too_short_for_the_batch(tmp_path):
    """A step of G tokens needs one more token, its last target."""
    write_shard(tmp_path / "n" / "n_train_000001.bin", TOKENS)
    assert ring_of(tmp_path, need=100).total == 100
    line = bad_line(tmp_path, need=101)
    for word in (str(tmp_path / "n"), "100 tokens", "101", "--total_batch_size", "add shards"):
        assert word in line
    write_shard(tmp_path / "n" / "n_val_000000.bin", TOKENS)
    line = bad_line(tmp_path, split="val", need=129)  # which one sequence needs, whatever the batch
    assert "--block_size" in line and "--total_batch_size" not in line


def test_a_token_beyond_the_vocabulary(tmp_path):
    """uint16 ids up to 65535 are read as they are; an id that has no embedding row names shard and remedy."""
    write_shard(tmp_path / "n" / "n_train_000001.bin", TOKENS)
    path = write_shard(tmp_path / "n" / "n_train_000002.bin", [5, 65535, 6])
    assert ring_of(tmp_path, vocab=65536).read(100, 3).tolist() == [5, 65535, 6]
    line = bad_line(tmp_path, vocab=65535)
    for word in (str(path), "65535", "vocab_size", "--vocab_size (only a new run can)"):
        assert word in line
    assert str(path) in bad_line(tmp_path, vocab=512)
    with pytest.raises(UserError):  # id == vocab_size is one too many
        ring_of(tmp_path, vocab=99).read(0, 100)
    ring_of(tmp_path, vocab=100).read(0, 100)


def test_a_data_folder_with_odd_characters_in_its_name(tmp_path):
    """glob treats brackets and stars as patterns."""
    folder = tmp_path / "my data [v1] *"
    write_shard(folder / "n" / "n_train_000001.bin", TOKENS)
    assert ring_of(folder).total == 100


def test_opening_a_shard_does_not_read_it(tmp_path):
    """103 FineWeb shards are 20 GB."""
    path = write_shard(tmp_path / "n" / "n_train_000001.bin", [7])
    path.write_bytes(shard_bytes([7], count=2**31 - 1))
    os.truncate(path, 1024 + 2 * (2**31 - 1))  # 4 GB that take no room on the disk
    ring = ring_of(tmp_path)
    assert ring.total == 2**31 - 1 and ring.read(2**31 - 3, 4).tolist() == [0, 0, 7, 0]


@pytest.mark.parametrize("fault", ["shortened", "disk"])
def test_a_shard_that_fails_while_it_is_used(tmp_path, monkeypatch, fault):
    """A memory map would end the process with SIGBUS."""
    path = write_shard(tmp_path / "n" / "n_train_000001.bin", TOKENS)
    ring = ring_of(tmp_path)
    if fault == "shortened":
        os.truncate(path, 1024 + 2 * 60)
        assert ring.read(50, 10).tolist() == list(range(50, 60))
    else:
        monkeypatch.setattr(os, "pread", mock.Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(UserError, match="shorter.*data/README.md" if fault == "shortened" else "Input/output.*disk"
                       ) as caught:
        ring.read(50, 11)
    assert str(path) in str(caught.value) and caught.value.one_rank  # the other ranks may still wait for this one


def test_a_shard_that_is_replaced_changes_nothing(tmp_path):
    path = write_shard(tmp_path / "n" / "n_train_000001.bin", TOKENS)
    ring = ring_of(tmp_path)
    other = write_shard(tmp_path / "other", TOKENS[::-1])
    os.replace(other, path)
    assert ring.read(0, 100).tolist() == TOKENS.tolist() and ring_of(tmp_path).read(0, 1).tolist() == [99]
