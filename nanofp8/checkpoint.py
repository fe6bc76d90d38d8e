"""Checkpoints: parameters by the model's own names, the same for TE and emulation, DDP, FSDP2 and any world size."""

import contextlib
import functools
import glob
import json
import math
import os
import random
import re
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException  # DCP's own, which is no Exception
from torch.distributed.tensor import DTensor

from nanofp8.config import UserError, last_line
from nanofp8.precision import fp8_state
from nanofp8.runlog import read_log


# A run cannot go on with another value of these
FIXED_FLAGS = ("n_layer n_embd n_head vocab_size block_size rope_base norm_eps logit_softcap dataset total_batch_size "
               "USE_8BIT_ADAM").split()


def random_state(procs, te):
    """State of every random generator of this rank, as tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, numbers, gauss_next = random.getstate()
    state = dict(torch=torch.get_rng_state(), numpy=torch.from_numpy(np.append(keys.astype(np.int64), position)),
                 python=torch.tensor(numbers))
    if procs.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(procs.device)
    if hasattr(te, "get_rng_state"):
        state["te_emulation"] = {str(d): g for d, g in te.get_rng_state()["generators"].items()}
    return state


def set_random_state(state, procs, te):
    """Put back what random_state() took."""
    torch.set_rng_state(state["torch"])
    numbers = state["numpy"].numpy()
    np.random.set_state(("MT19937", numbers[:-1].astype(np.uint32), int(numbers[-1])))
    random.setstate((3, tuple(state["python"].tolist()), None))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], procs.device)
    if "te_emulation" in state:
        te.set_rng_state(te.get_rng_state() | {"generators": state["te_emulation"]})


def training_state(model, optimizers, procs, te):
    """What a checkpoint holds, as nested dicts of live tensors: model, optim (by parameter name), fp8, rng (by rank)."""
    names = {p: name for name, p in model.named_parameters()}
    optim = {}
    for optimizer in optimizers.all:
        for p, held in optimizers.state_of(optimizer).items():
            optim[names[p]] = {k: v if torch.is_tensor(v) else torch.tensor(v) for k, v in held.items()}
    return dict(model={name: p.detach() for p, name in names.items()}, optim=optim, fp8=fp8_state(model),
                rng={str(procs.rank): random_state(procs, te)})


def steps_of(checkpoint):
    """The number in a checkpoint's name: step_1000000 comes after step_999750, whatever text or mtime say."""
    return int(re.search(r"(\d+)/*$", checkpoint)[1])


def complete_checkpoints(folder):
    """The complete checkpoints in a folder, by steps. Complete is what has meta.json, written last, before the folder gets its name."""
    found = [os.path.dirname(f) for f in glob.glob(os.path.join(glob.escape(folder), "step_*", "meta.json"))]
    return sorted((f for f in found if re.fullmatch(r"step_\d+", os.path.basename(f))), key=steps_of)


def invalidate_later_checkpoints(run_folder, first_step):
    """Where a run goes back to an earlier step: no checkpoint after it counts any more. The newest is the first, so that a kill in
    between leaves one whose log lines are there up to it."""
    later = [f for f in complete_checkpoints(os.path.join(run_folder, "ckpt")) if steps_of(f) > first_step]
    if later:
        print(f"resume: goes on from step {first_step}; what came after it is deleted: {', '.join(map(os.path.basename, later))}", flush=True)
    for folder in reversed(later):
        os.remove(os.path.join(folder, "meta.json"))


def saved_at(checkpoint):
    """When a checkpoint was saved, as it says itself (copying it changes every time stamp): seconds; 0 if it is damaged."""
    try:
        return float(read_checkpoint(checkpoint)["saved_at"])
    except (UserError, KeyError, TypeError, ValueError):
        return 0.0


def find_checkpoint(path):
    """The newest complete checkpoint at or below `path`, or None.

    A checkpoint stands for itself, a run folder for the one with most steps (what comes after it is deleted when a run is
    resumed at an earlier one), and a folder of runs for the newest of its runs, by the time each last saved.
    """
    if os.path.isfile(os.path.join(path, "meta.json")):
        return path
    folders = [path, os.path.join(path, "ckpt"), *glob.glob(os.path.join(glob.escape(path), "*", "ckpt"))]
    return max((found[-1] for found in map(complete_checkpoints, folders) if found), key=saved_at, default=None)


def run_folder_of(checkpoint):
    """The run folder that a checkpoint lies in, or None for one that was moved out of it."""
    folder, name = os.path.split(os.path.dirname(os.path.abspath(checkpoint)))
    return folder if name == "ckpt" and os.path.isfile(os.path.join(folder, "config.json")) else None


def read_checkpoint(folder):
    """meta.json of a checkpoint: step (optimizer steps done), tokens, flags, loader, ... Raises UserError if it is none."""
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as f:
            meta = json.load(f)
            named = re.fullmatch(r"step_(\d+)", os.path.basename(os.path.abspath(folder)))
            for key, fits in (("flags", lambda v: isinstance(v, dict)), ("tokens", lambda v: isinstance(v, int) and v > 0),
                              ("step", lambda v: isinstance(v, int) and v > 0 and (not named or v == int(named[1]))),
                              ("world_size", lambda v: isinstance(v, int) and v > 0), ("train_seconds", lambda v: isinstance(v, (int, float))),
                              ("loader", lambda v: all(isinstance(v[k], int) for k in ("step", "micro_batch")))):
                if not fits(meta[key]):
                    raise ValueError(f"its {key} is {meta[key]!r}")
            return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is no complete checkpoint ({error!r}): name a folder step_NNNNNN, a run folder, or leave it out")


def load_tensors(folder, state, no_dist=False):
    """Fill the tensors of a nested dict from a checkpoint, in place; raises UserError if one is missing or has another shape."""
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=no_dist)
    except (Exception, CheckpointException) as error:
        raise UserError(f"checkpoint {folder} cannot be loaded: {last_line(error)}", one_rank=True)


def load_weights(folder, tensors):
    """Fill {parameter name: tensor} from a checkpoint, in this process alone; it may have been saved by any number."""
    load_tensors(folder, {"model": tensors}, no_dist=True)


class Checkpoints:
    """Saves to <run folder>/ckpt/step_NNNNNN while training goes on, and keeps the newest few.

    The tensors are copied aside (to pinned memory on a GPU), and a thread writes them by torch.distributed.checkpoint, over
    a gloo group of its own. The folder has a temporary name until everything is on disk, meta.json last. A write that
    fails is reported, and training goes on.
    """

    def __init__(self, folder, cfg, procs):
        self.folder, self.keep, self.procs = os.path.join(folder, "ckpt"), cfg.keep_checkpoints, procs
        self.group, self.writer, self.pending = dist.new_group(backend="gloo"), ThreadPoolExecutor(1), None
        if procs.is_main:  # what is half written or half deleted; what else lies there is none of ours
            for name in os.listdir(self.folder) if os.path.isdir(self.folder) else ():
                path = os.path.join(self.folder, name)
                whole = name.startswith("step_") and os.path.isfile(os.path.join(path, "meta.json"))
                if re.fullmatch(r"(step|\.writing|\.replaced)_\d+", name) and not whole:
                    self.delete(path)
        dist.barrier(self.group)
        self.last = find_checkpoint(self.folder)

    @functools.cached_property
    def stager(self):
        """What copies the state aside. On a GPU it keeps its pinned memory for the next time (DefaultStager of torch 2.11 works but once)."""
        return dcp.staging.BlockingAsyncStager(cache_staged_state_dict=self.procs.device.type == "cuda")

    def prepare(self, make_state):
        """Copy the state aside once before training is on the clock: on a GPU that allocates the pinned memory, which the stager keeps,
        without which a first save of 561M parameters held training up for 1.6 s on an H100."""
        if self.keep and self.procs.device.type == "cuda":
            try:
                self.stager.stage(make_state())
            except RuntimeError as error:  # too little memory: each save will say so, training goes on
                self.procs.print(f"checkpoints: no pinned memory ({last_line(error)})")

    def save(self, step, make_state, meta):
        """Start a checkpoint of make_state() after `step` optimizer steps; returns the seconds that training stood still.

        Weights that are not finite are no checkpoint: nothing could go on from it, and it would drive out one that is good.
        """
        if not self.keep:
            return 0.0
        start = time.perf_counter()
        self.finish(wait=True)  # of the checkpoint before, should it still be under way
        temporary = os.path.join(self.folder, f".writing_{step:06d}")
        state, error, errors = None, None, [None] * self.procs.world_size
        try:
            self.writer.submit(int).result()  # its thread, which may not start
            state = make_state()
            weights = [p.to_local() if isinstance(p, DTensor) else p for p in state["model"].values()]
            largest = torch.stack([torch.linalg.vector_norm(p, ord=math.inf) for p in weights if p.numel()] or [torch.zeros(())])
            if not largest.isfinite().all():
                raise ValueError("the weights are not finite")
            state = self.stager.stage(state)
        except Exception as e:
            vars(self).pop("stager", None)  # it may hold half a copy
            error = last_line(e)
        # A rank that fails alone must not leave the others waiting for it in their write
        dist.all_gather_object(errors, error, self.group)
        if any(errors):
            rank = next(i for i, text in enumerate(errors) if text)
            self.failed(step, temporary, errors[rank] + (f" (rank {rank})" if len(errors) > 1 else ""))
        else:
            self.pending = step, meta, temporary, self.writer.submit(dcp.save, state, checkpoint_id=temporary, process_group=self.group)
        return time.perf_counter() - start

    def finish(self, wait=False):
        """Give a checkpoint that is all on disk its name, if there is one (wait: as soon as it is)."""
        if not self.pending or not (wait or self.pending[3].done()):
            return
        (step, meta, temporary, future), self.pending = self.pending, None
        try:
            future.result()
            if self.procs.is_main:
                with open(os.path.join(temporary, "meta.json"), "w", encoding="utf-8") as f:
                    json.dump(meta, f, indent=1)
                    f.flush()
                    os.fsync(f.fileno())
                final = os.path.join(self.folder, f"step_{step:06d}")
                if os.path.exists(final):  # from before the run was resumed at an earlier step
                    os.rename(final, os.path.join(self.folder, f".replaced_{step:06d}"))
                os.rename(temporary, final)
                ckpt = os.open(self.folder, os.O_RDONLY)
                os.fsync(ckpt)  # the name is on disk before an older checkpoint goes
                os.close(ckpt)
                self.last = final
                self.delete(os.path.join(self.folder, f".replaced_{step:06d}"))
                for old in [f for f in complete_checkpoints(self.folder) if f != final][:-self.keep + 1 or None]:
                    self.delete(old)
        except (Exception, CheckpointException) as error:
            text = last_line(error)
            with contextlib.suppress(OSError):  # torch's writer does not say that a disk is full
                text += f" ({shutil.disk_usage(os.path.dirname(self.folder)).free / 1e9:.2f} GB free)"
            self.failed(step, temporary, text)

    def delete(self, folder):
        """meta.json first: half deleted, a checkpoint must not count."""
        with contextlib.suppress(OSError):
            os.remove(os.path.join(folder, "meta.json"))
        shutil.rmtree(folder, ignore_errors=True)

    def failed(self, step, temporary, text):
        self.procs.print(f"checkpoint at step {step} failed, training goes on: {text}")
        if self.procs.is_main:
            shutil.rmtree(temporary, ignore_errors=True)

    def close(self):
        self.finish(wait=True)
        self.writer.shutdown()
        dist.barrier(self.group)  # ranks leave together, after rank 0 has named the last one


def folder_before_restart(cfg):
    """The run folder that these processes had before torchrun started them again (--max-restarts), or None.

    config.json names the torchrun that a run belongs to; of several, the last one that was started.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name in (None, "none", "nanogpt-fp8"):  # torchrun's and run.sh's defaults, which other runs have too
        return None
    folders = glob.glob(os.path.join(glob.escape(cfg.out_dir), "*"))
    folders += filter(None, [run_folder_of(find_checkpoint(cfg.resume) or "")] if cfg.resume not in ("", "auto") else [])
    found = []
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
            if config["torchrun"] == name:
                found.append((float(config["started_at"]), folder))
    return max(found)[1] if found else None


def checkpoint_to_resume(cfg, procs):
    """(checkpoint folder, its meta) by the flag `resume`, or (None, None) for a fresh start; refuses flags that differ.

    Processes that torchrun started again go on in the run folder they had, whatever `resume` says. The harmless
    differences are printed.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if not cfg.resume and not restarted:
        return None, None
    before = folder_before_restart(cfg) if restarted else None
    folder = find_checkpoint(before) if before else None
    if folder is None and cfg.resume == "auto":
        runs = [os.path.join(cfg.out_dir, cfg.run_name)]
        runs += [f for f in glob.glob(glob.escape(runs[0]) + "-*") if re.fullmatch(re.escape(runs[0]) + r"-\d+", f)]
        found = [f for f in map(find_checkpoint, runs) if f]
        # gpt-2 may be the second run called gpt, or one that was called gpt-2
        found = [f for f in found if run_folder_of(f) == os.path.abspath(runs[0])
                 or read_checkpoint(f)["flags"]["run_name"] == cfg.run_name]
        folder = max(found, key=saved_at, default=None)
    elif folder is None and cfg.resume:
        folder = find_checkpoint(cfg.resume)
    folder = procs.broadcast(folder)
    if folder is None and cfg.resume not in ("", "auto"):
        raise UserError(f"--resume={cfg.resume}: there is no complete checkpoint at or below it", 2)
    if folder is None:
        procs.print(f"resume={cfg.resume or 'auto (after a restart)'}: {before or os.path.join(cfg.out_dir, cfg.run_name)} has no "
                    f"complete checkpoint, starting afresh")
        return None, None
    meta = read_checkpoint(folder)
    changed = {k: (v, getattr(cfg, k)) for k, v in meta["flags"].items() if hasattr(cfg, k) and getattr(cfg, k) != v}
    for name in FIXED_FLAGS:
        if name in changed:
            was, now = changed[name]
            raise UserError(f"{folder} was trained with {name}={was}, which cannot become {now}: leave --{name} as it was", 2)
    run_folder = run_folder_of(folder)
    # A run that was killed after its last checkpoint only lacks its last line; as a restart, it may even have that
    ended = run_folder is None or any(r["kind"] == "done" for r in read_log(run_folder)) and not restarted
    if meta["step"] > cfg.max_iters or meta["step"] == cfg.max_iters and ended:
        raise UserError(f"{folder} has done {meta['step']} steps, and max_iters is {cfg.max_iters}: raise --max_iters", 2)
    for name, (was, now) in changed.items():
        if name not in ("resume", "out_dir", "run_name"):
            procs.print(f"resume: {name} was {was}, is now {now}")
    if run_folder and "run_name" in changed:  # it goes on in its own folder, where --resume=auto will look for its own name
        cfg.run_name = changed["run_name"][0]
        if "run_name" in cfg.explicit:
            procs.print(f"resume: goes on in {run_folder}; --run_name={changed['run_name'][1]} has no effect")
    return folder, meta


def data_fingerprint(ring, tokens):
    """What tells whether a checkpoint's data are still there: the size of the shards, and a checksum of the last 4,096 tokens
    of the first `tokens` of the ring."""
    first = max(0, tokens - 4096)
    return dict(tokens=ring.total, crc32=zlib.crc32(ring.read(first, tokens - first).tobytes()))


def check_data(folder, meta, ring):
    """Refuse shards that are not those of a checkpoint. More of them are fine until a run has come round to the first again.
    Raises UserError."""
    was, now = meta.get("data"), data_fingerprint(ring, meta["tokens"])
    if was and was["crc32"] != now["crc32"]:
        raise UserError(f"{folder} was trained on other data: {was['tokens']:,} tokens with checksum {was['crc32']:08x} before its position, where "
                        f"{os.path.dirname(ring.paths[0])} has {now['tokens']:,} with {now['crc32']:08x}: bring those shards back", 2)


def restore(folder, meta, model, optimizers, loader, procs, te):
    """Put a checkpoint's state back into model, optimizers, loader, scales and generators.

    Scales come back if the checkpoint has them, generators if the world size is the same; returns whether all scales did.
    """
    try:
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:
        raise UserError(f"checkpoint {folder} cannot be loaded: {error!r}")
    state = training_state(model, optimizers, procs, te)

    def known(tree, prefix):
        """The part of a nested dict that the checkpoint has, in the same shapes."""
        if not isinstance(tree, dict):
            return tree if prefix in saved and saved[prefix].size == tree.shape else None
        kept = {k: known(v, f"{prefix}.{k}") for k, v in tree.items()}
        return {k: v for k, v in kept.items() if v is not None} or None

    rng, fp8 = known(state.pop("rng"), "rng"), known(state.pop("fp8"), "fp8")
    load_tensors(folder, state)  # all of model and optim must be there
    scales = {k: v.clone() for k, v in (fp8 or {}).items()}
    if not any(k.endswith("amax_history") for k in scales):  # another FP8_AMAX_HISTORY: scales without it would not last
        scales = {}
    own = {"rng": rng or {}, "fp8": scales}
    if meta["world_size"] != procs.world_size:
        own.pop("rng")
    load_tensors(folder, own)
    # A rank's loss is divided by its own tokens of a step, so with more ranks its gradients are larger by as much:
    # unless their scales know, they saturate in the first step.
    factor, live = procs.world_size / meta["world_size"], fp8_state(model)
    for name, tensor in scales.items():
        if "scaling_bwd" in name:
            tensor = tensor / factor if name.endswith("scale") else tensor * factor
        live[name].copy_(tensor)
    optimizers.load_state(state["optim"], {name: p for name, p in model.named_parameters()}, meta)
    if own.get("rng"):
        set_random_state(own["rng"][str(procs.rank)], procs, te)
    loader.load_state_dict(meta["loader"])
    return scales.keys() == live.keys()
