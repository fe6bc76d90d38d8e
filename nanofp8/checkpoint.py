"""Checkpoints: save and restore.

A checkpoint is a folder <run folder>/ckpt/step_NNNNNN, written by torch.distributed.checkpoint, with a meta.json.
Without meta.json it does not count: that is written last, then the folder gets its name. Parameters have the model's
own names, the same for Transformer Engine and its emulation, for DDP and FSDP2, and for any number of ranks.
"""

import contextlib
import functools
import glob
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Iterable, Iterator, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException  # DCP's own, which is not an Exception
from torch.distributed.tensor import DTensor

from nanofp8.checkpoint_files import (
    FIXED_FLAGS,
    INDEX,
    TRAIN,
    checksums,
    complete_checkpoints,
    failure_line,
    find_damage,
    is_complete,
    load_tensors,
    older_checkpoints,
    read_checkpoint,
    read_index,
    steps_of,
)
from nanofp8.config import UserError, convert, flag_values, may_choose, script_flags
from nanofp8.files import console, error_line, is_seen, sync_to_disk
from nanofp8.precision import fp8_state
from nanofp8.procs import Processes, report_good_end
from nanofp8.resuming import find_checkpoint, run_folder_of, was_restarted
from nanofp8.runlog import read_log
from nanofp8.shards import ShardError, fingerprint
from nanofp8.sizes import ramp_points, steps_for

NOT_FINITE = "weights or optimizer state are not finite"
LAST_WRITE_SECONDS = 120.0  # seconds that a run which ends by an error waits for the checkpoint being written

# Flags that cannot change and that older checkpoints do not name, with the values that these were trained with
ADDED_FLAGS = dict(qk_scale=1.0, window_pattern="L", n_value_embed=0, USE_X0=False, batch_ramp="",
                   muon_variant="muon")
# The number format, with the defaults: a resumed run keeps its own as long as none of these is given or edited
FORMAT_FLAGS = dict(USE_FP8=True, FP8_RECIPE="delayed", FP8_MARGIN=0, FP8_AMAX_HISTORY=1024, USE_FP8_HEAD=True,
                    USE_NVFP4=False, NVFP4_HADAMARD=True, NVFP4_STOCHASTIC_ROUNDING=True, NVFP4_2D_WEIGHTS=True,
                    HIGH_PRECISION_LAYERS="")

# ----------------------------------------------------------------------------------------------------------------------
# What is saved


def random_state(procs: Processes, te: ModuleType) -> dict:
    """Return the state of every random generator of this rank, as tensors."""
    _, keys, position, _, _ = np.random.get_state()
    _, numbers, _ = random.getstate()
    state = dict(torch=torch.get_rng_state(), numpy=torch.from_numpy(np.append(keys.astype(np.int64), position)),
                 python=torch.tensor(numbers))
    if procs.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(procs.device)
    if hasattr(te, "get_rng_state"):  # of the emulation; Transformer Engine draws from torch's
        state["te_emulation"] = {str(d): g for d, g in te.get_rng_state()["generators"].items()}
    return state


def set_random_state(state: dict, procs: Processes, te: ModuleType) -> None:
    """Restore what random_state() returned."""
    torch.set_rng_state(state["torch"])
    numbers = state["numpy"].numpy()
    np.random.set_state(("MT19937", numbers[:-1].astype(np.uint32), int(numbers[-1])))
    random.setstate((3, tuple(state["python"].tolist()), None))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], procs.device)
    if "te_emulation" in state:
        te.set_rng_state(te.get_rng_state() | {"generators": state["te_emulation"]})


def training_state(run: Any) -> dict:
    """Return what a checkpoint of a train.Run holds, as nested dicts of live tensors.

    Keys: model and optim (by parameter name), fp8 (fp8_state()), rng (by rank).
    """
    names = {p: name for name, p in run.model.named_parameters()}
    optim = {}
    for optimizer in run.optimizers.all:
        for p, state in run.optimizers.state_of(optimizer).items():
            optim[names[p]] = {k: v if torch.is_tensor(v) else torch.tensor(v) for k, v in state.items()}
    model = run.parallel.buffers.exact_weights(names)
    return dict(model=model, optim=optim, fp8=fp8_state(run.model),
                rng={str(run.procs.rank): random_state(run.procs, run.precision.te)})


def data_fingerprint(ring: Any, position: int) -> dict:
    """Return what tells whether a checkpoint's data are still there.

    Args:
        ring: train.TokenRing of the train shards.
        position: tokens trained on so far.
    Returns: `tokens` of all shards, and `crc32` of the 4,096 tokens of the ring before `position`. It changes if
        shards are added after the first epoch. In shuffled epochs these are not the tokens that were read last.
    """
    first = max(0, position - 4096)
    return dict(tokens=ring.total, crc32=zlib.crc32(ring.read(first, position - first).tobytes()))


def shard_fingerprints(train_ring: Any, val_ring: Any, procs: Processes) -> dict[str, list[dict]]:
    """Return the fingerprints of all shards as rank 0 sees them: {"train": [...], "val": [...]}, in their order.

    Args: train_ring, val_ring: train.TokenRing. Raises: UserError if a shard cannot be read.
    """
    outcome = None, None
    if procs.is_main:
        try:
            with ThreadPoolExecutor(8) as pool:  # a network file system takes its time for each read
                outcome = {split: list(pool.map(fingerprint, ring.paths))
                           for split, ring in (("train", train_ring), ("val", val_ring))}, None
        except ShardError as error:
            outcome = None, str(error)
    found, failure = procs.broadcast(outcome)
    if failure:
        raise UserError(failure)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


def adopt_flags(checkpoint: str, cfg: SimpleNamespace, classic: dict, procs: Processes) -> dict:
    """Return the flags of a checkpoint that is to be resumed, after cfg has taken over some of them.

    Taken are, unless they were given or edited, the flags that cannot change, those of the recipe, and the number
    format: a run that goes on without the flags of its first start must not jump to the present defaults. The recipe is
    not taken if another preset is given.
    classic: train.CLASSIC: the recipe's flags, with the values for those that a checkpoint of older code lacks.
    Raises: UserError.
    """
    meta = read_checkpoint(checkpoint)
    saved, as_before = meta["flags"], edited_before(meta, cfg)
    explicit, other_preset = {*cfg.explicit} - as_before, "preset" not in {*cfg.auto} | as_before
    if "stages" in meta:
        cfg.batch_starts = meta["stages"]
    is_old = "lr_scaling" not in saved
    then = classic | saved

    def left_out(names: Iterable[str]) -> dict:
        return {name: then[name] for name in names if name not in explicit and name in then}

    taken = left_out(FIXED_FLAGS)
    if differing := [f"{name}={shown(value)}" for name, value in taken.items() if value != getattr(cfg, name)]:
        procs.print(f"resume: taken from the checkpoint, because they cannot change: {', '.join(differing)}")
    if is_old:
        follow = {*classic}
        procs.print("resume: the checkpoint is older than the present recipe, and continues with its own")
    elif not other_preset or cfg.preset == saved.get("preset"):
        follow = {*classic} - {"batch_size"}  # which depends on the machine
    elif cfg.lr_scaling == "length" and saved["lr_scaling"] == "sqrt":
        follow = {"lr_scaling"}  # once the default: the rates must not jump
    else:
        follow = set()
    if not any(name in explicit or getattr(cfg, name) != default for name, default in FORMAT_FLAGS.items()
               if name not in as_before):
        follow |= FORMAT_FLAGS.keys()
    kinds = script_flags(TRAIN)
    others = left_out(sorted((follow & kinds.keys()) - {*FIXED_FLAGS}))
    for name, value in others.items():
        others[name] = saved_value(checkpoint, name, value, kinds[name].kind)
    plan = SimpleNamespace(total_batch_size=then["total_batch_size"] or 1, batch_ramp=then["batch_ramp"],
                           batch_starts=meta.get("stages"), max_iters=1)
    if others.get("train_tokens") and steps_for(others["train_tokens"], plan) != others.get("max_iters"):
        others["train_tokens"] = 0  # max_iters was given, then or now
    by_tokens = others.get("train_tokens", cfg.train_tokens)  # resolve_length() computes max_iters
    differing = [f"{name}={value}" for name, value in others.items() if value != getattr(cfg, name)
                 and not (name == "max_iters" and by_tokens) and not (name == "train_tokens" and not by_tokens)]
    if differing and not is_old:
        procs.print(f"resume: taken from the checkpoint, because they were not given: {', '.join(differing)}")
    taken |= others
    if not other_preset and saved.get("preset") in get_args(kinds["preset"].kind):
        taken["preset"] = saved["preset"]  # a later resume that names it finds its own
        if may_choose(cfg, "batch_size"):
            cfg.batch_size = "auto"  # the largest one depends on the preset
    vars(cfg).update(taken)
    cfg.explicit = [name for name in cfg.explicit if name in explicit or name not in taken or name == "preset"]
    cfg.auto = [name for name in cfg.auto if taken.get(name, "auto") == "auto"]
    return saved


def edited_before(meta: dict, cfg: SimpleNamespace) -> set[str]:
    """Return the flags that were not given and stand in the script as when a checkpoint was saved. On a resume, such an
    edit does not count: the checkpoint knows what came of it. meta: of meta.json; older ones do not say."""
    return {name for name, value in meta.get("in_file", {}).items()
            if name not in cfg.given and cfg.in_file.get(name) == value}


def saved_value(checkpoint: str, name: str, value: Any, kind: Any) -> Any:
    """Return a checkpoint's value of a flag as the flag's type. Raises UserError if it is none."""
    try:
        return convert(kind, value)
    except ValueError as error:
        raise UserError(f"cannot load checkpoint {checkpoint}: its flag {name} is {value!r:.200}, but must be {error}; "
                        f"name another checkpoint") from None


def check_fixed_flags(checkpoint: str, cfg: SimpleNamespace) -> None:
    """Check that flags which cannot change are those of the checkpoint. Raises UserError (status 2)."""
    then = ADDED_FLAGS | read_checkpoint(checkpoint)["flags"]
    for name in FIXED_FLAGS:
        now = getattr(cfg, name)
        if name == "batch_ramp" and ramp_points(now) == ramp_points(then[name]):
            continue  # written in another way
        if name in then and then[name] != now:
            raise UserError(f"{checkpoint} was trained with {name}={shown(then[name])}, which cannot change to "
                            f"{shown(now)}; set --{name}={then[name]}", 2)


def shown(value: Any) -> Any:
    """Return a flag's value as messages show it: an empty text would not be seen."""
    return value if value != "" else "''"


def check_shards(checkpoint: str, saved: dict[str, list], shards: dict[str, list], folder: str) -> None:
    """Check that all shards that a checkpoint was trained and evaluated on are still there. More may follow them.

    Args:
        saved, shards: of shard_fingerprints(), then and now.
        folder: where the shards are now.
    Raises: UserError naming the first shard that is missing or another one.
    """
    for split, were in saved.items():
        now = shards[split]
        for i, was in enumerate(were):
            same = i < len(now) and all(now[i][key] == was[key] for key in ("bytes", "crc32"))
            if not same:
                other = f"{now[i]['name']} is another one" if i < len(now) else "it is missing"
                raise UserError(
                    f"{checkpoint} was trained on other data: {split} shard {i + 1} was {was['name']} (checksum "
                    f"{was['crc32']:08x}), and in {folder} {other}; bring it back, or start a new run without --resume",
                    2)


def check_unfinished(checkpoint: str, cfg: SimpleNamespace) -> None:
    """Check that a checkpoint's run has steps left. Raises UserError (status 2)."""
    step, folder = read_checkpoint(checkpoint)["step"], run_folder_of(checkpoint)
    # A run that was killed after its last checkpoint only lacks the line "done"; a restarted one may even have that
    complete = folder is None or any(r["kind"] == "done" for r in read_log(folder)) and not was_restarted()
    if step > cfg.max_iters or step == cfg.max_iters and complete:
        raise UserError(f"{checkpoint} has {step} steps, and max_iters is {cfg.max_iters}; raise --max_iters or "
                        f"--train_tokens", 2)


def check_resume(checkpoint: str, cfg: SimpleNamespace, ring: Any, shards: dict, procs: Processes) -> dict:
    """Return the meta.json of a checkpoint, after checking that length and data fit it. Prints flags that differ.

    cfg.run_name becomes that of the checkpoint's run folder: the run continues there.

    Args:
        ring: train.TokenRing of the train shards.
        shards: of shard_fingerprints().
    Raises: UserError if the run is complete, or if the data differ.
    """
    meta, now = read_checkpoint(checkpoint), vars(cfg)
    changed = {k: (was, now[k]) for k, was in meta["flags"].items() if k in now and now[k] != was}
    check_unfinished(checkpoint, cfg)
    folder = run_folder_of(checkpoint)
    for name, (was, new) in changed.items():
        if name not in ("resume", "out_dir", "run_name") and not (name == "train_tokens" and new == 0):
            procs.print(f"resume: {name} was {was}, is now {new}")
    if folder and "run_name" in changed:
        cfg.run_name = changed["run_name"][0]
        if "run_name" in cfg.explicit:
            procs.print(f"resume: continuing in {folder}; --run_name={changed['run_name'][1]} has no effect")
    was, data_folder = meta.get("data"), os.path.dirname(ring.paths[0])
    if was and "shards" in was:  # older checkpoints lack them
        check_shards(checkpoint, was["shards"], shards, data_folder)
    is_now = data_fingerprint(ring, meta["tokens"])
    # More shards are fine until a run has come round to the first one again
    if was and was["crc32"] != is_now["crc32"]:
        added = is_now["tokens"] > was["tokens"] and "shards" in was  # those that were there are still the same
        remedy = ("it has read them all once, so shards can no longer be added; remove the new ones" if added else
                  "bring those shards back")
        raise UserError(
            f"{checkpoint} was trained on other data: {was['tokens']:,} tokens with checksum {was['crc32']:08x} before "
            f"its position, and {data_folder} has {is_now['tokens']:,} with {is_now['crc32']:08x}; "
            f"{remedy}", 2)
    if was and was["tokens"] != is_now["tokens"]:
        procs.print(f"resume: the train shards held {was['tokens']:,} tokens, now {is_now['tokens']:,}")
    return meta


def restore(run: Any, folder: str, meta: dict) -> bool:
    """Restore a train.Run from a checkpoint: model, optimizers, data position, FP8 scales and random generators.

    Scales are restored if the checkpoint has them, generators if the number of ranks is the same. meta: of meta.json.
    Returns: whether all scales were restored. Raises: UserError.
    """
    saved, state, procs = read_index(folder).state_dict_metadata, training_state(run), run.procs
    trained = {f"model.{name}" for name, _ in run.model.named_parameters()}
    unknown = sorted(name for name in saved if name.startswith("model.") and name not in trained)
    if unknown:  # of a part that this version lacks: without it, the loss would jump
        raise UserError(f"checkpoint {folder} has weights that this version of train.py does not train "
                        f"({', '.join(unknown[:3])}); resume it with the version that wrote it", 2)

    def known(tree: Any, prefix: str) -> Any:
        """The part of a nested dict that the checkpoint has, in the same shapes."""
        if not isinstance(tree, dict):
            return tree if prefix in saved and saved[prefix].size == tree.shape else None
        kept = {k: known(v, f"{prefix}.{k}") for k, v in tree.items()}
        return {k: v for k, v in kept.items() if v is not None} or None

    rng, fp8 = known(state.pop("rng"), "rng"), known(state.pop("fp8"), "fp8")
    load_tensors(folder, state)  # all of model and optim must be there
    run.parallel.buffers.gather()
    scales = {k: v.clone() for k, v in (fp8 or {}).items()}
    if not any(k.endswith("amax_history") for k in scales):  # FP8_AMAX_HISTORY changed: scales alone would not last
        scales = {}
    optional = {"rng": rng or {}, "fp8": scales}
    if meta["world_size"] != procs.world_size:
        optional.pop("rng")
    load_tensors(folder, optional)
    # A rank divides its loss by its own tokens of a step, so with more ranks its gradients are larger by that factor.
    # With the old scales they would saturate in the first step.
    factor, live = procs.world_size / meta["world_size"], fp8_state(run.model)
    for name, tensor in scales.items():
        if "scaling_bwd" in name:
            tensor = tensor / factor if name.endswith("scale") else tensor * factor
        live[name].copy_(tensor)
    run.optimizers.load_state(state["optim"], dict(run.model.named_parameters()), meta)
    if optional.get("rng"):
        set_random_state(optional["rng"][str(procs.rank)], procs, run.precision.te)
    run.loader.start_step(meta["step"])
    return scales.keys() == live.keys()


# ----------------------------------------------------------------------------------------------------------------------
# Saving


def entry_bytes(state: dict, prefix: str = "") -> dict[str, int]:
    """Return what each tensor of nested dicts takes on disk, by its path; of a DTensor, the whole."""
    sizes = {}
    for key, value in state.items():
        name = f"{prefix}.{key}"
        sizes |= entry_bytes(value, name) if isinstance(value, dict) else {
            name: value.numel() * value.element_size() + 2048}  # and the entry's own headers
    return sizes


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
    """Let threads take turns in Python's interpreter every 0.1 ms.

    Training lets go of the interpreter in each operation that it launches. With Python's own interval, 5 ms, a thread
    that writes a checkpoint would hold up each of them by that.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class Checkpoints:
    """Save to <run folder>/ckpt/step_NNNNNN while training continues, and keep the newest few.

    save() copies the tensors (to pinned memory on a GPU), and a thread writes them over a gloo group of its own. Until
    everything is on disk the folder has a temporary name. A write that fails is reported, and training continues.
    """

    def __init__(self, folder: str, keep: int, procs: Processes):
        """Delete what earlier processes left half written.

        Args:
            folder: the run folder.
            keep: number of newest checkpoints to keep (0: write none).
        """
        self.folder, self.keep, self.procs = os.path.join(folder, "ckpt"), keep, procs
        self.group, self.pending = dist.new_group(backend="gloo"), None
        # A new thread's GPU is number 0. What DCP asks CUDA there would make a context of each rank on it
        on_its_gpu = (torch.cuda.set_device, (procs.device,)) if procs.device.type == "cuda" else ()
        self.writer = ThreadPoolExecutor(1, "checkpoint", *on_its_gpu)
        self.pinned = procs.device.type == "cuda"  # whether the copies are in pinned memory
        self.failure = ""  # why the last write failed
        # torch.save() imports torch.utils.serialization at its first call. Later it may not be there: run.sh replaces
        # the environment when requirements change, and then every checkpoint of a run that trains on would fail
        torch.save(torch.zeros(1), io.BytesIO())
        if procs.is_main:
            for name in os.listdir(self.folder) if os.path.isdir(self.folder) else ():
                path = os.path.join(self.folder, name)
                whole = name.startswith("step_") and is_complete(path)
                if re.fullmatch(r"(step|\.writing|\.replaced)_\d+", name) and not whole:
                    self.delete(path)
        dist.barrier(self.group)
        self.last = find_checkpoint(self.folder)

    @functools.cached_property
    def stager(self) -> Any:
        """Copies the state. It keeps its memory if that is pinned (DefaultStager of torch 2.11 works only once)."""
        return dcp.staging.BlockingAsyncStager(cache_staged_state_dict=self.pinned)

    def stage(self, state: dict) -> dict:
        """Return a copy of the state in the host's memory; for a GPU in pinned memory, as long as there is enough: WSL2
        may have no more than 0.5 to 1 GB (microsoft/WSL, issues 8447 and 14078)."""
        try:
            return self.stager.stage(state)
        except RuntimeError as error:
            vars(self).pop("stager", None)  # it may hold half a copy
            if not self.pinned:
                raise
            self.pinned = False
            console(f"checkpoints: rank {self.procs.rank} has too little pinned memory ({error_line(error)}); saving "
                    f"works without it, but blocks training for longer")
        return self.stager.stage(state)

    def prepare(self, make_state: Callable[[], dict]) -> None:
        """Copy the state once before training is timed, which allocates the pinned memory of a GPU.

        Without it the first save of 561M parameters blocked training for 1.6 s on an H100.
        """
        if self.keep and self.procs.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # too little memory: each save will say so, and training continues
                self.stage(make_state())

    def save(self, step: int, make_state: Callable[[], dict], meta: dict) -> float:
        """Start a checkpoint after `step` optimizer steps; return the seconds that it blocked training.

        Weights and optimizer state that are not finite are not saved: no run could continue from them, and they would
        drive out a good checkpoint.

        Args:
            make_state: returns training_state().
            meta: content of meta.json, without checksums.
        """
        if not self.keep:
            return 0.0
        start = time.perf_counter()
        self.finish(wait=True)  # of the checkpoint before, if it is still being written
        temporary = os.path.join(self.folder, f".writing_{step:06d}")
        state, failure, failures = None, None, [None] * self.procs.world_size
        try:
            self.writer.submit(int).result()  # its thread, which may not start
            state = make_state()
            tensors = [*state["model"].values(), *(t for of in state.get("optim", {}).values() for t in of.values())]
            tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
            tensors = [t for t in tensors if t.numel() and t.is_floating_point()]
            norms = torch._foreach_norm(tensors, math.inf) if tensors else []
            norms = [norm.float().to(self.procs.device) for norm in norms]
            if norms and not torch.stack(norms).isfinite().all():
                raise ValueError(NOT_FINITE)
            state = self.stage(state)
        except Exception as error:
            vars(self).pop("stager", None)  # it may hold half a copy
            failure = error_line(error)
        # A rank that fails alone must not leave the others waiting for it in their write
        dist.all_gather_object(failures, failure, self.group)
        if any(failures):
            rank = next(i for i, text in enumerate(failures) if text)
            self.report_failure(step, temporary, failures[rank] + (f" (rank {rank})" if len(failures) > 1 else ""))
        else:
            self.pending = step, temporary, self.writer.submit(self.write, step, state, meta, temporary)
        return time.perf_counter() - start

    @short_turns()
    def write(self, step: int, state: dict, meta: dict, temporary: str) -> None:
        """Write a checkpoint under its temporary name (the writer's thread, on all ranks).

        Where the disk is too full, delete older checkpoints down to the newest whole one, and try once more.
        Raises: RuntimeError, or what DCP raises, on all ranks.
        """
        if self.procs.is_main:  # more than `keep` may be there: the flag may have been lowered
            for old in complete_checkpoints(self.folder)[:-self.keep]:
                self.delete(old)
        try:
            self.write_once(state, meta, temporary)
        except (Exception, CheckpointException) as error:
            reason = self.lack_of_space(state, temporary, error)
            deleted = self.on_rank_0(self.make_room) if reason else []
            if not deleted:
                raise RuntimeError(reason or failure_line(error)) from None
            self.procs.print(f"checkpoint at step {step}: {reason}; deleted {', '.join(deleted)}, trying once more")
            try:
                self.write_once(state, meta, temporary)
            except (Exception, CheckpointException) as error:
                raise RuntimeError(self.lack_of_space(state, temporary, error) or failure_line(error)) from None

    def write_once(self, state: dict, meta: dict, temporary: str) -> None:
        """Write all tensors, then meta.json with the checksums of all files (rank 0). Raises as write() does."""
        def own_checksums() -> dict:
            names = glob.glob(f"__{self.procs.rank}_*", root_dir=temporary) + [INDEX] * self.procs.is_main
            return checksums(temporary, names)

        def write_meta() -> None:
            for name in files:
                if not is_seen(os.path.join(temporary, name)):
                    raise RuntimeError(f"no {name} here, though another rank has written it; all machines need the "
                                       f"same folder")
            path = os.path.join(temporary, "meta.json")
            with open(path, "w", encoding="utf-8") as f:
                json.dump(meta | dict(files=files), f, indent=1)
            sync_to_disk(path)

        # With a writer given, DCP need not import fsspec, beside training, to look for one. The tensors are in the
        # host's memory: no copies from a GPU are to be overlapped, for which the writer would wait for CUDA streams
        writer = dcp.FileSystemWriter(temporary, per_thread_copy_ahead=0)
        dcp.save(state, checkpoint_id=temporary, storage_writer=writer, process_group=self.group)
        files = {name: of_file for of_rank in self.together(own_checksums) for name, of_file in of_rank.items()}
        self.on_rank_0(write_meta)

    def together(self, work: Callable[[], Any]) -> list:
        """Do work on all ranks; return their results, by rank. If one fails, raise RuntimeError on all."""
        try:
            outcome = work(), None
        except Exception as error:
            outcome = None, error_line(error)
        outcomes = [None] * self.procs.world_size
        dist.all_gather_object(outcomes, outcome, self.group)
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise RuntimeError(failure + (f" (rank {rank})" if len(outcomes) > 1 else ""))
        return [result for result, _ in outcomes]

    def on_rank_0(self, work: Callable[[], Any]) -> Any:
        """Do work on rank 0 and return its result on all ranks. Raises as together() does."""
        return self.together(work if self.procs.is_main else lambda: None)[0]

    def lack_of_space(self, state: dict, temporary: str, error: BaseException) -> str:
        """Delete what a failed write has left; return a line if the disk was too full for it, else "".

        torch's writer does not say so: what a checkpoint takes is compared with what is free.
        """
        def free_bytes() -> float:
            shutil.rmtree(temporary, ignore_errors=True)
            with contextlib.suppress(OSError):
                return shutil.disk_usage(os.path.dirname(self.folder)).free
            return math.inf

        free, sizes = self.on_rank_0(free_bytes), {}
        for of_rank in self.together(lambda: entry_bytes(state)):
            sizes |= of_rank
        needed, text = sum(sizes.values()), failure_line(error)
        if free >= needed and not re.search("No space left|quota exceeded", text):  # a quota, or too few inodes
            return ""
        return (f"{'the disk is too full' if free < needed else text} "
                f"(a checkpoint takes {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free)")

    def make_room(self) -> list[str]:
        """Delete the complete checkpoints before the newest whole one; return their names."""
        whole = (f for f in reversed(complete_checkpoints(self.folder)) if not find_damage(f, weights=False))
        older = older_checkpoints(next(whole, ""))[::-1]
        for folder in older:
            self.delete(folder)
        return [os.path.basename(folder) for folder in older]

    def finish(self, wait: bool = False) -> None:
        """Give a checkpoint its name once it is on disk, if there is one (wait: block until then)."""
        if not self.pending or not (wait or self.pending[2].done()):
            return
        (step, temporary, future), self.pending = self.pending, None
        try:
            future.result()
            if self.procs.is_main:
                self.rename(step, temporary)
            self.failure = ""
        except (Exception, CheckpointException) as error:
            self.report_failure(step, temporary, failure_line(error))

    def finish_after_error(self, kind: type | None, *_: object) -> None:
        """Finish the checkpoint that is being written when an error ends the run; an exit callback of an ExitStack.

        The other ranks' threads write on meanwhile. Rank 0 alone gives a checkpoint its name: it helps if rank 0 fails
        too. A write that hangs is given up after LAST_WRITE_SECONDS.
        """
        if kind is not None and self.pending and wait_for([self.pending[2]], LAST_WRITE_SECONDS).done:
            self.finish()

    def rename(self, step: int, temporary: str) -> None:
        """Give the folder its final name, then delete what exceeds `keep` (rank 0). Raises OSError."""
        final, replaced = (os.path.join(self.folder, f"{name}_{step:06d}") for name in ("step", ".replaced"))
        if os.path.exists(final):  # from before the run was resumed at an earlier step
            os.rename(final, replaced)
        os.rename(temporary, final)
        sync_to_disk(self.folder)  # the name is on disk before an older checkpoint is deleted
        self.last = final
        self.delete(replaced)
        for old in [f for f in complete_checkpoints(self.folder) if f != final][:-self.keep + 1 or None]:
            self.delete(old)

    def delete(self, folder: str) -> None:
        """Delete a checkpoint, meta.json first: half deleted, it must not count."""
        with contextlib.suppress(OSError):
            os.remove(os.path.join(folder, "meta.json"))
        shutil.rmtree(folder, ignore_errors=True)

    def report_failure(self, step: int, temporary: str, text: str) -> None:
        """Print why a checkpoint could not be written, and delete what there is of it."""
        self.failure = text
        self.procs.print(f"checkpoint at step {step} failed, training continues: {text}")
        if self.procs.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        else:  # another machine may have a folder of its own
            with contextlib.suppress(OSError):
                for path in glob.glob(os.path.join(glob.escape(temporary), f"__{self.procs.rank}_*")):
                    os.remove(path)
                os.rmdir(temporary)

    def close(self) -> None:
        """Finish the last checkpoint. Ranks leave together, after rank 0 has given it its name."""
        self.finish(wait=True)
        self.writer.shutdown()
        dist.barrier(self.group)


def save_checkpoint(run: Any, steps: int) -> None:
    """Start a checkpoint of a train.Run after this many optimizer steps; it is written while training continues."""
    cfg, procs = run.cfg, run.procs
    tokens, stages = run.loader.plan.tokens(steps), run.loader.plan.starts
    run.progress.flush()
    meta = dict(
        step=steps, tokens=tokens, world_size=procs.world_size, loader=dict(step=steps, micro_batch=0),
        data=data_fingerprint(run.loader.ring, tokens) | dict(shards=run.fingerprints),
        train_seconds=run.progress.train_seconds, parameters=run.parameters, versions=run.machine["versions"],
        **run.optimizers.meta, guard=run.guard.state_dict(), saved_at=time.time(), flags=flag_values(cfg),
        in_file=cfg.in_file, **({"stages": stages} if len(stages) > 1 else {}))
    blocked = run.checkpoints.save(steps, lambda: training_state(run), meta)
    run.last_save = time.monotonic()
    if cfg.keep_checkpoints:
        procs.print(f"step {steps}/{cfg.max_iters} | checkpoint started (blocked training for {blocked:.2f} s)")


def python_command() -> str:
    """Return how to start this process's Python from here: python, where that is the one, or its path."""
    folder, name = os.path.split(os.path.abspath(sys.executable))
    found = shutil.which("python")
    if found and os.path.dirname(os.path.abspath(found)) == folder:
        return "python"
    inside = os.path.relpath(folder)
    return shlex.quote(os.path.join(folder if inside.startswith("..") else inside, name))


def finish_run(run: Any, steps: int) -> None:
    """Report how a train.Run ended: at its last step, or stopped by a signal.

    Raises: UserError if its last checkpoint could not be written.
    """
    stopped = steps < run.cfg.max_iters
    newest, failure = run.procs.broadcast((run.checkpoints.last, run.checkpoints.failure))
    if not stopped:
        run.progress.done()
    if run.cfg.keep_checkpoints and (newest is None or steps_of(newest) != steps):
        then = "continue with --resume=auto" if newest else "train again"
        remedy = ("lower the learning rates or weight decay" if NOT_FINITE in str(failure) else
                  "make room or choose another --out_dir")
        raise UserError(f"{'stopped by a signal' if stopped else 'trained to the end'} after {steps} steps, but their "
                        f"checkpoint could not be written: {failure}. Newest checkpoint: {newest or 'none'}; "
                        f"{remedy}, then {then}")
    if not stopped and newest and steps_of(newest) == steps:  # not one from before, with keep_checkpoints=0
        run.procs.print(f"next: {python_command()} sample.py --ckpt={shlex.quote(run.folder)} continues a text with "
                        f"this model")
    if stopped:
        then = (f"continue with the same command and --resume=auto (from {newest})" if newest else
                "no checkpoint was kept")
        run.procs.print(f"\nstopped by a signal after {steps} steps; {then}")
    report_good_end(run.procs)
