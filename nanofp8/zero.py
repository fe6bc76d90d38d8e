"""Divide gradients, optimizer state and updates among ranks that all hold the whole model: ZeRO-2 (arXiv 1910.02054).

This is what USE_DDP does. All micro-batches of a step add to the same fp32 gradients, without communication, so that
they can be CUDA graphs. Then each gradient is averaged over the ranks, but only its owner gets the result
(reduce-scatter). The owner updates its weights and sends them to the others (all-gather). Together that moves as many
bytes as DDP's all-reduce, and each rank does 1 / world_size of the optimizer's work and holds that much of its state.

A parameter is divided in one of three ways:
- A matrix that Muon trains belongs to one rank as a whole, because Muon orthogonalises whole matrices.
- Embeddings and head are divided by rows.
- All others are small and are updated by every rank alike.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

# torch 2.13 gave them new names and warns of the old ones
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def assign_owners(parameters: list[Tensor], world_size: int) -> list[int]:
    """Return the rank that owns each matrix. Matrices of one shape go round the ranks, largest shapes first, each shape
    from where the one before ended: so all ranks get about the same work."""
    owners, turn = [0] * len(parameters), 0
    for i in sorted(range(len(parameters)), key=lambda i: (-parameters[i].numel(), parameters[i].shape, i)):
        owners[i], turn = turn % world_size, turn + 1
    return owners


class Shards:
    """Buffers that hold parameters and gradients so that each rank's part of them is one piece of memory."""

    def __init__(self, model: torch.nn.Module, matrices: Iterable[Tensor], procs: Any, reduce_dtype: torch.dtype,
                 divide_rows: bool = True):
        """Move the model's parameters into the buffers, and give each a gradient of zeros, which must stay in place.

        Args:
            matrices: parameters that one rank owns as a whole.
            procs: Processes (rank, world_size, device, mesh).
            reduce_dtype: gradients are added over the ranks in it, fp32 or bf16.
            divide_rows: divide other matrices by rows; False: every rank updates them alike.
        """
        self.procs, self.reduce_dtype = procs, reduce_dtype
        world_size, matrices = procs.world_size, list(matrices)
        owned = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in owned]
        self.rows = [p for p in others if divide_rows and p.ndim == 2 and p.shape[0] % world_size == 0
                     and p.numel() >= 2 ** 12]
        divided = {id(p) for p in self.rows}
        self.small = [p for p in others if id(p) not in divided]
        self.owners = dict(zip(matrices, assign_owners(matrices, world_size), strict=True))

        device = procs.device
        of_rank = [[p for p, owner in self.owners.items() if owner == rank] for rank in range(world_size)]
        length = max((sum(p.numel() for p in owned_by) for owned_by in of_rank), default=0)
        self.weights, self.gradients = (torch.zeros(world_size, length, device=device) for _ in range(2))
        for rank, owned_by in enumerate(of_rank):
            place(owned_by, self.weights[rank], self.gradients[rank])
        self.small_gradients = torch.zeros(sum(p.numel() for p in self.small), device=device)
        place(self.small, None, self.small_gradients)
        for p in self.rows:
            p.grad = torch.zeros_like(p)
        # What this rank's optimizers see of a divided parameter: its own rows, and their gradient
        self.own_rows = {}
        for p in self.rows:
            part = torch.nn.Parameter(self.piece(p.data))
            part.grad = self.piece(p.grad)
            self.own_rows[p] = part

    def piece(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows of a tensor that is divided evenly, as a view."""
        return tensor.view(self.procs.world_size, -1, *tensor.shape[1:])[self.procs.rank]

    def own(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return what this rank updates of these parameters."""
        return [self.own_rows.get(p, p) for p in parameters if self.owners.get(p, self.procs.rank) == self.procs.rank]

    def whole_state(self, state: dict[Tensor, dict]) -> dict[Tensor, dict]:
        """Return an optimizer's state by the model's parameters; that of divided rows as DTensors of the whole."""
        whole = {id(part): p for p, part in self.own_rows.items()}

        def wrap(part: Tensor, value: Any) -> Any:
            if torch.is_tensor(value) and value.shape == part.shape:
                return DTensor.from_local(value, self.procs.mesh, [Shard(0)], run_check=False)
            return value

        return {whole.get(id(p), p): {k: wrap(p, v) for k, v in values.items()} if id(p) in whole else values
                for p, values in state.items()}

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        torch._foreach_zero_([self.gradients, self.small_gradients, *(p.grad for p in self.rows)])

    def reduce(self) -> None:
        """Average the gradients over the ranks: each rank gets those that it owns, and the small ones."""
        for gradient in (self.gradients, *(p.grad for p in self.rows)):
            if gradient.numel():
                self.average(gradient.view(-1), self.piece(gradient).view(-1))
        self.average(self.small_gradients, self.small_gradients)

    def average(self, source: Tensor, result: Tensor) -> None:
        """Average `source` over the ranks into `result`, a view of it: the whole, or this rank's piece."""
        is_piece = result.numel() < source.numel()
        sent = source if self.reduce_dtype == source.dtype else source.to(self.reduce_dtype)
        if source.device.type != "cuda":  # gloo has neither reduce-scatter nor averages
            sent = sent.clone()
            dist.all_reduce(sent)
            result.copy_(self.piece(sent) if is_piece else sent).div_(self.procs.world_size)
            return
        received = result if sent is source else self.piece(sent) if is_piece else sent
        if is_piece:
            reduce_scatter(received, sent, op=dist.ReduceOp.AVG)
        else:
            dist.all_reduce(sent, op=dist.ReduceOp.AVG)
        if received is not result:
            result.copy_(received)

    def squared_norm(self) -> Tensor:
        """Return this rank's share of the squared norm of all gradients; the shares add up over the ranks."""
        own = [self.gradients[self.procs.rank], *(part.grad for part in self.own_rows.values())]
        norms = torch.stack(torch._foreach_norm([*own, self.small_gradients]))
        return norms[:-1].square().sum() + norms[-1].square() / self.procs.world_size

    def gather(self) -> None:
        """Send each rank's updated weights to all others."""
        for weights in (self.weights, *(p.data for p in self.rows)):
            if weights.numel():
                own = self.piece(weights)
                # NCCL takes the piece in its place; gloo does not
                all_gather(weights.view(-1), (own if own.is_cuda else own.clone()).view(-1))


def place(parameters: list[Tensor], weights: Tensor | None, gradients: Tensor) -> None:
    """Make the gradients of parameters, and their values unless `weights` is None, views of these flat buffers."""
    offset = 0
    for p in parameters:
        end = offset + p.numel()
        if weights is not None:
            weights[offset:end].copy_(p.data.view(-1))
            p.data = weights[offset:end].view(p.shape)
        p.grad = gradients[offset:end].view(p.shape)
        offset = end
