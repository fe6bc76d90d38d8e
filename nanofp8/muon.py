"""Muon: Dion's, or the same rules in plain PyTorch; and bitsandbytes' AdamW."""

import contextlib
import functools
import math
import os
import shutil
import warnings
from types import ModuleType
from typing import Any, Sequence

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from nanofp8 import epilogues
from nanofp8.config import UserError
from nanofp8.files import error_line
from nanofp8.host import compiling_later
from nanofp8.optional_triton import kernels, triton


class TorchMuon(torch.optim.Optimizer):
    """What Dion's Muon does (https://kellerjordan.github.io/posts/muon), in plain PyTorch, for where Dion cannot run.

    torch.optim.Muon multiplies in bf16 on CPUs too, which takes half of a step on many of them (fp32_on_cpu()).

    - Each matrix of a fused weight (split_sizes: rows of q, k, v) is orthogonalised by itself.
    - The update is scaled by sqrt(fan_out / fan_in), as Dion's adjust_lr="spectral_norm".
    - Orthogonalisation runs to convergence (orthogonalize()): singular values within 0.01 of 1. Dion's Polar Express
      leaves them between 0.86 and 1.14.
    - The momentum buffer averages gradients, with weight 1 - momentum, as torch.optim.Muon's; Dion adds them up. The
      update does not depend on the buffer's scale, so only the ratio matters: when the momentum changes, buffers are
      rescaled to keep it.
    - Decoupled weight decay goes by the base learning rate, and may be cautious: only where update and weight have the
      same sign (arXiv 2510.12402).
    - With muon_beta2 each row of an update is divided by its root mean square, averaged over steps, and the update is
      scaled back to its old norm: NorMuon (arXiv 2510.05491), as Dion does it for whole matrices. Of matrices that
      FSDP2 shards, Dion normalizes each shard by itself.
    - Sharded parameters (DTensor) are gathered, updated alike on every rank, and sharded again.

    `param_groups` has one group for each matrix; the groups that set rates and momentum are in `groups`.
    """

    def __init__(self, groups: Sequence[dict]):
        """Take parameter groups as Dion does.

        groups: each with params (fp32 matrices), lr, weight_decay, mu (momentum); cautious_wd; for fused weights,
            split_sizes; for NorMuon, muon_beta2.
        """
        self.groups, self.parts, self.variances = groups, {}, {}
        matrices = []
        for group in groups:
            for p in group["params"]:
                # The whole matrix of this parameter; a view of it if it is not sharded
                sharded = isinstance(p, DTensor)
                whole = torch.empty(p.shape, dtype=p.dtype, device=p.device) if sharded else p.detach()
                sizes = list(group.get("split_sizes", whole.shape[:1]))
                parts = list(whole.split(sizes))
                self.parts[p] = (whole, parts)
                if "muon_beta2" in group:
                    self.variances[p] = torch.zeros(whole.shape[0], 1, device=p.device)
                variances = self.variances[p].split(sizes) if p in self.variances else [None] * len(parts)
                for part, variance in zip(parts, variances, strict=True):
                    matrices.append(dict(params=[part], source=group, variance=variance,
                                         ratio=math.sqrt(part.shape[0] / part.shape[1]),
                                         whole_ratio=math.sqrt(whole.shape[0] / whole.shape[1])))
        if not matrices:  # this rank owns no matrix, and torch wants one
            matrices = [dict(params=[torch.zeros(1, 1)], source=groups[0], variance=None)]
        super().__init__(matrices, dict(momentum=groups[0]["mu"]))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update the parameters that have a gradient."""
        assert closure is None
        for p, (whole, parts) in self.parts.items():
            if p.grad is None:
                continue
            grad = p.grad
            if isinstance(p, DTensor):
                whole.copy_(p.full_tensor())
                grad = grad.full_tensor()
            for part, part_grad in zip(parts, grad.split([len(part) for part in parts]), strict=True):
                part.grad = part_grad
        for group in self.param_groups:
            source, (part,), mu = group["source"], group["params"], group["source"]["mu"]
            if part.grad is None:
                continue
            if part not in self.state:
                self.state[part]["momentum_buffer"] = torch.zeros_like(part)
            buffer = self.state[part]["momentum_buffer"]
            if mu != group["momentum"]:
                buffer.mul_((1 - mu) / (1 - group["momentum"]))
            group["momentum"] = mu
            buffer.lerp_(part.grad, 1 - mu)
            update = group["ratio"] * orthogonalize(part.grad.lerp(buffer, mu)).float()  # Nesterov's momentum
            if group["variance"] is not None:
                # Dion's variances are those of updates before they are scaled for their shape
                ratio = group["whole_ratio"]
                update, variance = normalize_rows(update / ratio, group["variance"], source["muon_beta2"])
                update *= ratio
                group["variance"].copy_(variance)
            decayed = part * (part * update >= 0) if source.get("cautious_wd", False) else part
            part.sub_(source["lr"] * (source["weight_decay"] * decayed + update))
        for p, (whole, parts) in self.parts.items():
            for part in parts:
                part.grad = None
            if isinstance(p, DTensor) and p.grad is not None:
                sharded = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
                p.to_local().copy_(sharded.to_local())

    def buffers(self) -> dict[torch.Tensor, torch.Tensor]:
        """Return the momentum buffers, {parameter: whole matrix}; zero before the first step."""
        def of_part(part):
            return self.state[part]["momentum_buffer"] if part in self.state else torch.zeros_like(part)

        return {p: torch.cat([of_part(part) for part in parts]) for p, (_, parts) in self.parts.items()}

    def load_buffers(self, buffers: dict[torch.Tensor, torch.Tensor], momentum: float) -> None:
        """Take over what buffers() returned when the momentum was `momentum`."""
        for p, whole in buffers.items():
            parts = self.parts[p][1]
            for part, piece in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                self.state[part]["momentum_buffer"] = piece.to(part.device, part.dtype).clone()
        for group in self.param_groups:
            group["momentum"] = momentum

    def momentum(self) -> dict[torch.Tensor, torch.Tensor]:
        """Return Dion's state by parameter: the sum of gradients, where this class keeps the average."""
        return {p: b / (1 - self.param_groups[0]["momentum"]) for p, b in self.buffers().items()}

    def load_momentum(self, momenta: dict[torch.Tensor, torch.Tensor], momentum: float | None = None) -> None:
        """Take over Dion's state, {parameter: whole matrix}, at `momentum` (default: the present one)."""
        momentum = self.param_groups[0]["momentum"] if momentum is None else momentum
        self.load_buffers({p: m * (1 - momentum) for p, m in momenta.items()}, momentum)


def normalize_rows(update: torch.Tensor, variance: torch.Tensor, beta2: float | torch.Tensor,
                   split_sizes: Sequence[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return NorMuon's update (..., M, N) fp32, and the new variance: each row over its root mean square, averaged over
    steps; the norm of each matrix is kept (arXiv 2510.05491).

    variance (..., M, 1): average of the mean squares of rows. split_sizes: rows of the matrices that are fused in one.
    This is dion.normuon.normuon_normalization_stacked with two passes over the update in place of ten.
    """
    rows = torch.linalg.vector_norm(update, dim=-1, keepdim=True, dtype=torch.float32)
    variance = torch.lerp(variance, rows.square() / update.shape[-1], 1 - beta2)
    scale = 1 / (variance.sqrt() + 1e-8)
    sizes = list(split_sizes or rows.shape[-2:-1])
    norms, new_norms = (torch.cat([torch.linalg.vector_norm(part, dim=-2, keepdim=True).expand_as(part)
                                   for part in values.split(sizes, dim=-2)], dim=-2) for values in (rows, rows * scale))
    return update * (scale * norms / new_norms.clamp(min=1e-8)), variance


def momentum_update(G: list[torch.Tensor], M: list[torch.Tensor], momentum: torch.Tensor,
                    nesterov: bool) -> list[torch.Tensor]:
    """Update the momenta M by the gradients G in place, and return what is to be orthogonalised, in bf16.

    This is dion.muon.muon_update_pre_orthogonalize in one pass in place of five.
    """
    mu = torch.as_tensor(momentum, dtype=torch.float32, device=M[0].device)
    updates = [torch.empty_like(m, dtype=torch.bfloat16) for m in M]
    for grad, moment, update in zip(G, M, updates, strict=True):
        kernels.muon_momentum[(triton.cdiv(moment.numel(), 2048),)](
            grad.contiguous(), moment, update, mu, moment.numel(), nesterov, 2048)
    return updates


def apply_update(X: list[torch.Tensor], U: list[torch.Tensor], base_lr: torch.Tensor, adjusted_lr: torch.Tensor,
                 weight_decay: torch.Tensor, cautious_wd: bool = False) -> None:
    """Decay the weights X and subtract their updates U, in place.

    This is dion.muon.muon_update_post_orthogonalize in one pass in place of up to nine, without temporary tensors.
    """
    factors = [torch.as_tensor(factor, dtype=torch.float32, device=X[0].device)
               for factor in (base_lr, adjusted_lr, weight_decay)]
    for weight, update in zip(X, U, strict=True):
        kernels.muon_update[(triton.cdiv(weight.numel(), 2048),)](
            weight, update.contiguous(), *factors, weight.numel(), cautious_wd, 2048)


def use_own_functions(kernels_run: bool) -> None:
    """Replace functions of Dion that make many passes over memory when they are not compiled.

    kernels_run: whether our Triton kernels run on the device. They read the momentum there, so that CUDA graphs can.
    """
    from dion import muon, normuon
    normuon.normuon_normalization_stacked = normalize_rows
    if kernels_run:
        for module in (muon, normuon):
            module.muon_update_pre_orthogonalize = momentum_update
            module.muon_update_post_orthogonalize = apply_update
        warnings.filterwarnings("ignore", "To copy construct from a tensor")  # Dion copies the momentum


def dion_muon(choice: str, device: torch.device, compiled: bool = True, why: str = "") -> tuple[type | None, str]:
    """Return Dion's Muon class, or None and the reason why TorchMuon takes its place.

    Args:
        choice: the flag muon_impl: "auto", "dion" or "torch".
        compiled: whether Dion's update is to be compiled.
        why: a reason that the caller knows.
    Raises: UserError if muon_impl is "dion" and Dion cannot run.
    """
    if choice == "torch":
        return None, "muon_impl=torch"
    try:
        with contextlib.nullcontext() if compiled else compiling_later():
            from dion import Muon
    except Exception as error:  # a broken installation fails with more than ImportError
        why = why or f"Dion cannot be imported ({error_line(error)})"
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
    if not why and compiled and device.type == "cpu" and not any(map(shutil.which, compilers)):
        why = "Dion compiles its kernels and there is no C++ compiler"
    if why and choice == "dion":
        raise UserError(f"muon_impl=dion, but {why}; use --muon_impl=auto, or mend that (requirements.txt has Dion)")
    return (None, why) if why else (Muon, "")


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Return the orthogonal matrix nearest to `matrix` (M, N), in bf16: Newton and Schulz's iteration to convergence.

    Its polynomial (15 X - 10 X^3 + 3 X^5) / 8 pulls all singular values towards 1.
    """
    x = matrix.bfloat16()
    wide = (x.mT if x.shape[0] > x.shape[1] else x) / x.norm().clamp(min=1e-7)
    for _ in range(14):
        wide = odd_polynomial(wide[None], 15 / 8, -10 / 8, 3 / 8)[0]
    return wide.mT if x.shape[0] > x.shape[1] else wide


def fp32_on_cpu(x: torch.Tensor) -> torch.Tensor:
    """Return what is multiplied in place of a bf16 matrix. A CPU without instructions for bf16 takes 50 to 100 times as
    long with it as with fp32, which holds the same products; results are rounded to bf16 as a GPU's are."""
    return x if x.is_cuda else x.float()


def odd_polynomial(x: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """Return a X + b (X X^T) X + c (X X^T)^2 X for each matrix X of x (L, M, N), bf16."""
    X = fp32_on_cpu(x)
    A = fp32_on_cpu((X @ X.mT).to(x.dtype))
    B = fp32_on_cpu(torch.baddbmm(A, A, A, beta=b, alpha=c).to(x.dtype))
    return torch.baddbmm(X, B, X, beta=a).to(x.dtype)


def polar_express(G: torch.Tensor, epsilon: float = 1e-6, quack: bool = False) -> torch.Tensor:
    """Orthogonalise matrices (..., m, n) as Dion's function of the same name (arXiv 2505.16932); returns bf16.

    Nothing is compiled: each polynomial's sums are part of its matmuls. Dion's Triton kernels for it autotune for
    minutes (results/NOTES.md). quack: QuACK multiplies (on Hopper), unless a size is no multiple of 8, which QuACK
    refuses: on three ranks Dion pads FSDP2's 1,280 rows to 1,281.
    """
    from dion.polar_express import _POLAR_EXPRESS_COEFFS
    X = G.bfloat16().reshape(-1, *G.shape[-2:])
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + epsilon)
    wide = X.mT if X.shape[-2] > X.shape[-1] else X
    quack = quack and not any(size % 8 for size in wide.shape[1:])
    polynomial, wide = (epilogues.odd_polynomial, wide.contiguous()) if quack else (odd_polynomial, wide)
    for coefficients in _POLAR_EXPRESS_COEFFS:
        wide = polynomial(wide, *coefficients)
    return (wide.mT if X.shape[-2] > X.shape[-1] else wide).reshape(G.shape)


def make_muon(groups: Sequence[dict], choice: str, device: torch.device, mesh: Any, compiled: bool,
              obstacle: str = "", quack: bool = False) -> tuple[torch.optim.Optimizer, str]:
    """Build Muon for these parameter groups (params, lr, weight_decay, mu, split_sizes), and say whose it is.

    Args:
        choice: the flag muon_impl.
        mesh: how Dion shares the work out: a DeviceMesh for sharded parameters, a process group for whole ones, None.
        compiled: compile Dion's update.
        obstacle: why Dion cannot take these parameters; "": it can.
        quack: QuACK multiplies for Dion's Muon, unless it is compiled.
    Returns: the optimizer, and its description for the start-up table. Raises: UserError, as dion_muon().
    """
    Muon, why = dion_muon(choice, device, compiled, obstacle)
    if Muon is None:
        return TorchMuon(groups), f"{'NorMuon' if 'muon_beta2' in groups[0] else 'Muon'} in plain PyTorch: {why}"
    if compiled:  # Dion's many shapes
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    if "muon_beta2" in groups[0]:
        from dion import NorMuon as Muon
    if not compiled:
        kernels_run = triton is not None and device.type == "cuda"
        use_own_functions(kernels_run)
        if kernels_run:
            groups = [g | {key: torch.tensor(g[key], device=device) for key in ("mu", "weight_decay")} for g in groups]
    orthogonalise = functools.partial(polar_express, quack=True) if quack and not compiled else polar_express
    muon = Muon(groups, mesh, nesterov=True, adjust_lr="spectral_norm", newton_schulz_func=orthogonalise)
    return muon, f"{type(muon).__name__} by Dion"


def make_adam(groups: Sequence[dict], device: torch.device, sharded: bool, **options: Any) -> torch.optim.AdamW:
    """Build AdamW for these parameter groups; on a GPU so that a CUDA graph can run it, unless they are sharded: torch
    does not mix DTensors with learning rates on the device."""
    on_device = device.type == "cuda" and not sharded
    adam = torch.optim.AdamW(groups, fused=True, capturable=on_device, **options)
    if on_device:
        for group in adam.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
    return adam


def set_value(group: dict, name: str, value: float) -> None:
    """Set a number in a parameter group; in place where it is a tensor, which a CUDA graph may read."""
    if torch.is_tensor(group[name]):
        group[name].fill_(value)
    else:
        group[name] = value


def muon_groups(muon: torch.optim.Optimizer) -> list[dict]:
    """Return the parameter groups whose "lr" and "mu" set the schedule."""
    return muon.groups if isinstance(muon, TorchMuon) else muon.param_groups


class OptimizerSet:
    """Several optimizers stepped as one: what does not depend on who optimizes what.

    A subclass sets `muon`, `all` (muon first), `groups` ({name: parameter group}), `compiled` (Dion's update),
    `buffers` (zero.Local, Zero2 or Gathered). Where the updates are CUDA graphs, `graphs` has the others' and Muon's.
    """

    muon: torch.optim.Optimizer
    all: list[torch.optim.Optimizer]
    groups: dict[str, dict]
    compiled: bool
    buffers: Any
    graphs: Sequence[torch.cuda.CUDAGraph] = ()

    def step(self) -> None:
        """Update all parameters. The others come before Muon, so that ranks can send what they updated meanwhile."""
        others, muon = ([graph.replay for graph in self.graphs]
                        or [functools.partial(self.update, part) for part in (self.all[1:], self.all[:1])])
        others()
        self.buffers.send_rows()
        muon()

    def update(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Step these optimizers."""
        with torch.compiler.set_stance("default" if self.compiled else "force_eager"):
            for optimizer in optimizers:
                optimizer.step()

    def capture(self, pool: Any) -> None:
        """From now on run the updates as CUDA graphs: most of Muon's kernels take longer to launch than to run.

        Nothing is captured where one of the updates needs the host: bitsandbytes', TorchMuon, a sharded or compiled
        one. Dion's CudaGraphOptimizer does the same for one optimizer, with memory of its own.

        pool: memory pool of the micro-batches' graphs, whose memory is free during an update. All kernels must have
        run before, and gradients must stay in place. Raises: UserError if the capture fails.
        """
        # What the schedule changes must be on the device. All other numbers are constants in the graphs
        changing = [g["lr"] for g in self.groups.values() if g["params"]]
        changing += [g[key] for g in muon_groups(self.muon) if g["params"] for key in ("mu", "weight_decay")]
        on_device = all(torch.is_tensor(value) and value.is_cuda for value in changing)
        if not on_device or self.compiled or isinstance(self.muon, TorchMuon):
            return
        graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
        try:
            for graph, part in zip(graphs, (self.all[1:], self.all[:1]), strict=True):
                # thread_local: as in fused.MicroBatchGraphs
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    self.update(part)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an attempt that fails leaves torch's random numbers unusable
            why = error_line(error.__context__ or error)  # the end of a broken capture fails too
            raise UserError(f"the optimizers cannot be captured as CUDA graphs ({why}); use --USE_CUDA_GRAPHS=False, "
                            f"or the version of Dion that requirements.txt names") from error
        self.graphs = graphs

    def parameters(self) -> list[torch.Tensor]:
        """Return what this rank updates."""
        return [p for group in self.groups.values() for p in group["params"]]

    @property
    def meta(self) -> dict:
        """What a checkpoint must say of Muon's buffers: whose they are, and at which momentum."""
        if isinstance(self.muon, TorchMuon):  # its buffers are at the momentum of the last step that was taken
            return dict(muon="torch", muon_momentum=float(self.muon.param_groups[0]["momentum"]))
        return dict(muon="dion", muon_momentum=float(self.muon.param_groups[0]["mu"]))

    def state_of(self, optimizer: torch.optim.Optimizer) -> dict:
        """Return the state of one optimizer, {parameter: {name: tensor or number}}; Muon's buffers as `momentum`."""
        if isinstance(optimizer, TorchMuon):
            variances = optimizer.variances
            state = {p: dict(momentum=buffer) | (dict(variance_neuron=variances[p]) if p in variances else {})
                     for p, buffer in optimizer.buffers().items()}
        else:
            state = optimizer.state
        return self.buffers.whole_state(state)

    def load_state(self, saved: dict[str, dict], parameters: dict[str, torch.Tensor], meta: dict) -> None:
        """Take over a checkpoint's state. Muon's buffers are converted if the other library wrote them.

        Args:
            saved: {parameter name: {name: tensor}}; live tensors in it were filled in place.
            parameters: {parameter name: parameter} of the model.
            meta: what `meta` was when the state was saved.
        """
        names = {p: name for name, p in parameters.items()}
        names |= {part: names[p] for p, part in self.buffers.replaced().items()}
        if isinstance(self.muon, TorchMuon):
            load = self.muon.load_momentum if meta["muon"] == "dion" else self.muon.load_buffers
            load({p: saved[names[p]]["momentum"] for p in self.muon.parts}, meta["muon_momentum"])
        elif meta["muon"] == "torch":
            for state in self.muon.state.values():
                state["momentum"] /= 1 - meta["muon_momentum"]
        for optimizer in self.all[1:]:
            for p, state in optimizer.state.items():
                for key, value in state.items():
                    if not torch.is_tensor(value):  # bitsandbytes counts steps in a plain number
                        state[key] = type(value)(saved[names[p]][key].item())

    def warm_up(self, parallel: Any) -> None:
        """Compile kernels and allocate state, by a step with zero gradients and learning rate 0.

        parallel: train.Parallel.
        """
        for group in self.groups.values():
            set_value(group, "lr", 0.0)
        for p in self.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
        self.step()
        parallel.buffers.gather()
        parallel.buffers.zero_grad()
        for optimizer in self.all:  # the moments are still zero: only the step counts must go back
            for group in optimizer.param_groups:
                if "step" in group:
                    group["step"] = 0
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"] = state["step"] * 0


def import_bitsandbytes(device: torch.device, sharded: bool) -> ModuleType:
    """Import bitsandbytes for its AdamW8bit. Raises UserError that says why it cannot run here."""
    if sharded:
        raise UserError("USE_8BIT_ADAM cannot update sharded parameters; use --USE_FSDP2=False or "
                        "--USE_8BIT_ADAM=False (only a new run can)", 2)
    if device.type != "cuda":
        raise UserError("USE_8BIT_ADAM needs a GPU; use one, or --USE_8BIT_ADAM=False (only a new run can)", 2)
    try:
        import bitsandbytes
    except Exception as error:
        raise UserError(f"USE_8BIT_ADAM needs bitsandbytes, which cannot be imported ({error}); "
                        f"pip install bitsandbytes") from None
    return bitsandbytes
