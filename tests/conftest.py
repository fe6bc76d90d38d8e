"""What all CPU tests share. The helpers themselves are functions in helpers.py."""

import gc
import os
import pathlib
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests' tensors are too small for threads

if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup; processes that tests start would ignore it too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a script's shell
    signal.signal(signal.SIGINT, signal.default_int_handler)

HERE = pathlib.Path(__file__).resolve().parent
for path in (str(HERE), str(HERE.parent)):
    if path not in sys.path:
        sys.path.insert(0, path)

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():  # before triton is imported: test_kernels.py then runs the kernels in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Fixtures that start processes
SLOW_FIXTURES = {"two_ranks", "script_run", "forker"}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(config, items):
    """Run the fast tests first: a mistake shows within the first minute.

    With pytest-xdist's --dist loadgroup, one process runs all tests of such a fixture, so that it is made once.
    """
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
            if config.pluginmanager.hasplugin("xdist"):
                item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def signal_handlers():
    """Put signal handlers back: a run that an error breaks off keeps its own, so that it can report the error."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_full_collections(monkeypatch):
    """See helpers.skip_full_collections(). A test that runs train.py has imported helpers."""
    if "helpers" in sys.modules:
        sys.modules["helpers"].skip_full_collections(monkeypatch.setattr)


@pytest.fixture
def fresh(monkeypatch):
    """Seeds, the emulation's state, no GPU and no torchrun around: the same start for every test in this process."""
    import torch.distributed as dist

    from nanofp8 import te_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    te_emulation.manual_seed(0)
    te_emulation._state.__init__()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.enable()  # a run that was broken off leaves it off
    gc.unfreeze()


@pytest.fixture(scope="session")
def forker(tmp_path_factory):
    """A helpers.Forker."""
    import helpers

    started = helpers.Forker(tmp_path_factory.mktemp("forker"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A data folder with the dataset "synthetic": three train shards and one val shard, vocabulary 512."""
    import helpers

    folder = tmp_path_factory.mktemp("data")
    tokens = helpers.markov_tokens(6000, seed=1)
    for i, part in enumerate((tokens[:1000], tokens[1000:3001], tokens[3001:])):
        helpers.write_shard(folder / "synthetic" / f"s_train_{i + 1:06d}.bin", part)
    helpers.write_shard(folder / "synthetic" / "s_val_000000.bin", helpers.markov_tokens(1500, seed=2))
    return folder
