"""Dion's Muon, or torch's by the same rules."""

import math
import os
import shutil

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from nanofp8.config import UserError


class TorchMuon(torch.optim.Muon):
    """torch.optim.Muon made to do what Dion's Muon does, for where Dion cannot run.

    - Each matrix of a fused weight (split_sizes: rows of q, k, v) is orthogonalised apart.
    - The update is scaled by sqrt(fan_out / fan_in), as Dion's adjust_lr="spectral_norm".
    - Orthogonalisation runs to convergence with the classical quintic (15, -10, 3)/8: singular values within 0.01 of 1.
      Dion's Polar Express leaves them between 0.86 and 1.14, torch's own constants between 0.7 and 1.2.
    - torch averages gradients into its momentum buffer with weight 1 - momentum where Dion adds them up. The update
      has no scale, so only the ratio matters: when the momentum changes, buffers are rescaled to keep it.
    - Sharded parameters (DTensor) are gathered, updated alike on every rank, and cut again.

    torch.optim.Muon holds one stand-in tensor for each matrix; the model's own parameters are in `groups`.
    """

    def __init__(self, groups, nesterov=True):
        self.groups, self.parts = groups, {}
        stand_ins = []
        for group in groups:
            for p in group["params"]:
                # Whole matrices of this parameter; views of it where it is not sharded
                full = p.detach() if not isinstance(p, DTensor) else torch.empty(p.shape, dtype=p.dtype, device=p.device)
                parts = [part for part in full.split(list(group.get("split_sizes", full.shape[:1])))]
                self.parts[p] = (full, parts)
                for part in parts:
                    ratio = math.sqrt(part.shape[0] / part.shape[1])
                    # torch's "original" scales by sqrt(max(1, fan_out/fan_in)): make up what is below 1
                    stand_ins.append(dict(params=[part], source=group, lr_scale=min(1.0, ratio)))
        super().__init__(stand_ins, momentum=groups[0]["mu"], nesterov=nesterov, adjust_lr_fn="original",
                         ns_coefficients=(15 / 8, -10 / 8, 3 / 8), ns_steps=14)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for p, (full, parts) in self.parts.items():
            if p.grad is None:
                continue
            grad = p.grad
            if isinstance(p, DTensor):
                full.copy_(p.full_tensor())
                grad = grad.full_tensor()
            for part, part_grad in zip(parts, grad.split([len(part) for part in parts])):
                part.grad = part_grad
        for group in self.param_groups:
            source, (part,) = group["source"], group["params"]
            group["lr"] = source["lr"] * group["lr_scale"]
            group["weight_decay"] = source["weight_decay"] / group["lr_scale"]  # torch multiplies it by the scaled lr
            if source["mu"] != group["momentum"] and part in self.state:
                self.state[part]["momentum_buffer"].mul_((1 - source["mu"]) / (1 - group["momentum"]))
            group["momentum"] = source["mu"]
        super().step()
        for p, (full, parts) in self.parts.items():
            for part in parts:
                part.grad = None
            if isinstance(p, DTensor) and p.grad is not None:
                p.to_local().copy_(distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None).to_local())

    def zero_grad(self, set_to_none=True):
        for p in self.parts:
            p.grad = None

    def buffers(self):
        """torch's momentum buffers by parameter, {parameter: whole matrix}; zero before the first step."""
        return {p: torch.cat([self.state[x]["momentum_buffer"] if x in self.state else torch.zeros_like(x) for x in parts])
                for p, (_, parts) in self.parts.items()}

    def load_buffers(self, buffers, momentum):
        """Take over what buffers() gave, at the momentum it was at."""
        for p, whole in buffers.items():
            parts = self.parts[p][1]
            for x, piece in zip(parts, whole.split([len(x) for x in parts])):
                self.state[x]["momentum_buffer"] = piece.to(x.device, x.dtype).clone()
        for group in self.param_groups:
            group["momentum"] = momentum

    def momentum(self):
        """Dion's state by parameter: the sum of gradients, where torch keeps the average."""
        return {p: b / (1 - self.param_groups[0]["momentum"]) for p, b in self.buffers().items()}

    def load_momentum(self, momenta, momentum=None):
        """Take over Dion's state, {parameter: whole momentum}, at `momentum` (default: the one it is at)."""
        momentum = self.param_groups[0]["momentum"] if momentum is None else momentum
        self.load_buffers({p: m * (1 - momentum) for p, m in momenta.items()}, momentum)


def dion_muon(choice, device, compiled=True):
    """Dion's Muon class, or None and the reason why torch.optim.Muon takes its place. compiled: whether its update is to be."""
    if choice == "torch":
        return None, "muon_impl=torch"
    why = ""
    try:
        from dion import Muon
    except ImportError as error:
        why = f"Dion cannot be imported ({error})"
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
    if not why and compiled and device.type == "cpu" and not any(map(shutil.which, compilers)):
        why = "Dion compiles its kernels and there is no C++ compiler"
    if why and choice == "dion":
        raise UserError(f"muon_impl=dion, but {why}: install requirements.txt, or --muon_impl=auto")
    return (None, why) if why else (Muon, "")


def polar_express(G, epsilon=1e-6):
    """Dion's orthogonalisation of the same name (arXiv 2505.16932), of matrices (..., m, n), with nothing to compile.

    Each polynomial's sums are part of its matmuls. Dion's Triton kernels for it autotune for minutes (results/NOTES.md).
    """
    from dion.polar_express import _POLAR_EXPRESS_COEFFS
    X = G.bfloat16().reshape(-1, *G.shape[-2:])
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + epsilon)
    wide = X.mT if X.shape[-2] > X.shape[-1] else X
    for a, b, c in _POLAR_EXPRESS_COEFFS:
        A = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(A, A, A, beta=b, alpha=c), wide, beta=a)
    return (wide.mT if X.shape[-2] > X.shape[-1] else wide).reshape(G.shape)


def import_bitsandbytes(procs, sharded):
    """bitsandbytes, or a UserError that says why its AdamW8bit cannot run here."""
    if sharded:
        raise UserError("USE_8BIT_ADAM cannot update sharded parameters: use --USE_FSDP2=False, or --USE_8BIT_ADAM=False", 2)
    if procs.device.type != "cuda":
        raise UserError("USE_8BIT_ADAM needs a GPU: use --USE_8BIT_ADAM=False", 2)
    try:
        import bitsandbytes
    except Exception as error:
        raise UserError(f"USE_8BIT_ADAM needs bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes")
    return bitsandbytes
