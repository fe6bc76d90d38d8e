"""Divide gradients, optimizer state and updates among the ranks (ZeRO, arXiv 1910.02054).

**Zero2** is what USE_DDP does: ZeRO-2, in which all ranks hold the whole model. All micro-batches of a step add to the
same fp32 gradients, without communication, so that they can be CUDA graphs. Then each gradient is averaged over the
ranks, but only its owner gets the result (reduce-scatter). The owner updates its weights and sends them to the others
(all-gather). Together that moves as many bytes as DDP's all-reduce, and each rank does 1 / world_size of the
optimizer's work and holds that much of its state.

A parameter is divided in one of three ways:
- A matrix that Muon trains belongs to one rank as a whole, because Muon orthogonalises whole matrices.
- Embeddings and head are divided by rows.
- All others are updated by every rank alike. Most are small; embeddings and head are among them where their rows
  cannot be divided.

Rows are sent while Muon still computes.

If updated weights are sent in bf16, owners keep fp32 copies of theirs (masters), which the optimizers update. All ranks
then compute with the rounded weights, owners too, so that all compute the same.

**Gathered** is what USE_FSDP2 does, unless FSDP2_RESHARD frees gathered weights after each use. FSDP2 divides all
parameters by rows, and optimizers update each rank's rows. Between two updates all ranks hold the whole model in bf16
and sum gradients in fp32, in place, at addresses that do not change, so that micro-batches can be CUDA graphs. FSDP2's
hooks, which gather weights and reduce gradients module by module, have nothing left to do and are removed.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
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


class Local:
    """What train.Parallel and Optimizers ask for, on one rank; and with FSDP2's hooks (FSDP2_RESHARD), which do all
    exchange between ranks. Zero2 and Gathered do it another way."""

    def __init__(self, model: torch.nn.Module, world_size: int):
        """model: whose parameters' gradients are dropped after each step."""
        self.model, self.world_size = model, world_size

    def own(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return what this rank updates of these parameters."""
        return list(parameters)

    def replaced(self) -> dict[Tensor, Tensor]:
        """Return {parameter of the model: what this rank updates in its place}."""
        return {}

    def whole_state(self, state: dict[Tensor, dict]) -> dict[Tensor, dict]:
        """Return an optimizer's state by the model's parameters."""
        return state

    def exact_weights(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Return the model's weights by name, for a checkpoint."""
        return {name: p.detach() for p, name in names.items()}

    def in_model(self) -> contextlib.AbstractContextManager:
        """Return a context in which the model can compute."""
        return contextlib.nullcontext()

    def reduce(self) -> None:
        """Average the gradients over the ranks."""

    def squared_norm(self) -> Tensor:
        """Return this rank's share of the squared norm of all gradients; the shares add up over the ranks."""
        return gradient_norm(self.model.parameters()).square() / self.world_size

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.model.parameters():
            p.grad = None

    def send_rows(self) -> None:
        """Begin to send updated weights."""

    def gather(self) -> None:
        """Get the weights that other ranks have updated."""


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the global norm of the gradients over all ranks, a scalar on the device."""
    norm = torch.nn.utils.get_total_norm([g for g in map(gradient_of, parameters) if g is not None], foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def gradient_of(weight: Tensor) -> Tensor | None:
    """Return where the gradients of a weight are summed: its main_grad (Gathered), else its grad."""
    return getattr(weight, "main_grad", weight.grad)


class Buffers(Local):
    """Tensors whose first dimension is divided evenly among the ranks."""

    def __init__(self, procs: Any, reduce_dtype: torch.dtype):
        """procs: Processes (rank, world_size, device, mesh). reduce_dtype: gradients are added over the ranks in it."""
        self.procs, self.reduce_dtype = procs, reduce_dtype

    def piece(self, tensor: Tensor) -> Tensor:
        """Return this rank's rows of a tensor that is divided evenly, as a view."""
        return tensor.view(self.procs.world_size, -1, *tensor.shape[1:])[self.procs.rank]

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


class Zero2(Buffers):
    """The matrices that Muon trains in one buffer, each rank's in one piece; other large ones divided by rows."""

    def __init__(self, model: torch.nn.Module, matrices: Iterable[Tensor], procs: Any, reduce_dtype: torch.dtype,
                 gather_dtype: torch.dtype = torch.float32, divide_rows: bool = True):
        """Move Muon's matrices into the buffer, and give each parameter a gradient of zeros, which must stay in place.

        Args:
            matrices: parameters that one rank owns as a whole.
            procs: Processes (rank, world_size, device, mesh).
            reduce_dtype: gradients are added over the ranks in it, fp32 or bf16.
            gather_dtype: updated weights are sent to the other ranks in it, fp32 or bf16.
            divide_rows: divide other matrices by rows; False: every rank updates them alike.
        """
        super().__init__(procs, reduce_dtype)
        self.gather_dtype = gather_dtype
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
        self.sending = []  # of gather(): (work, what is received, weights that it is for)
        # What this rank's optimizers update: of a divided parameter its own rows, or their master; of a matrix itself,
        # or its master
        self.has_masters = gather_dtype != torch.float32
        self.own_rows = {p: with_grad(self.piece(p.data).clone() if self.has_masters else self.piece(p.data),
                                      self.piece(p.grad)) for p in self.rows}
        self.masters, self.own_matrices = self.weights[procs.rank], {}
        if self.has_masters:
            self.masters, offset = self.masters.clone(), 0
            for p in of_rank[procs.rank]:
                self.own_matrices[p] = with_grad(self.masters[offset:offset + p.numel()].view(p.shape), p.grad)
                offset += p.numel()

    def replaced(self) -> dict[Tensor, Tensor]:
        """Return {parameter of the model: what this rank updates in its place}."""
        return self.own_rows | self.own_matrices

    def own(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Return what this rank updates of these parameters."""
        replaced, rank = self.replaced(), self.procs.rank
        return [replaced.get(p, p) for p in parameters if self.owners.get(p, rank) == rank]

    def whole(self, rows: Tensor) -> DTensor:
        """Return the tensor of which this rank holds these rows."""
        return DTensor.from_local(rows, self.procs.mesh, [Shard(0)], run_check=False)

    def exact_weights(self, names: dict[Tensor, str]) -> dict[str, Tensor]:
        """Return the model's weights by name, for a checkpoint. names: of its parameters.

        Where the weights are rounded, their masters: this rank's matrices, and divided parameters as DTensors.
        """
        if not self.has_masters:
            return {name: p.detach() for p, name in names.items()}
        exact = {p: self.whole(part.detach()) for p, part in self.own_rows.items()}
        exact |= {p: part.detach() for p, part in self.own_matrices.items()} | {p: p.detach() for p in self.small}
        return {name: exact[p] for p, name in names.items() if p in exact}

    def whole_state(self, state: dict[Tensor, dict]) -> dict[Tensor, dict]:
        """Return an optimizer's state by the model's parameters; that of divided rows as DTensors of the whole."""
        model_parameters = {id(part): p for p, part in self.replaced().items()}

        def wrap(p: Tensor, value: Any) -> Any:
            is_piece = p in self.own_rows and torch.is_tensor(value) and value.shape == self.own_rows[p].shape
            return self.whole(value) if is_piece else value

        of_model = {model_parameters.get(id(part), part): values for part, values in state.items()}
        return {p: {k: wrap(p, v) for k, v in values.items()} for p, values in of_model.items()}

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        torch._foreach_zero_([self.gradients, self.small_gradients, *(p.grad for p in self.rows)])

    def reduce(self) -> None:
        """Average the gradients over the ranks: each rank gets those that it owns, and the small ones."""
        for gradient in (self.gradients, *(p.grad for p in self.rows)):
            if gradient.numel():
                self.average(gradient.view(-1), self.piece(gradient).view(-1))
        self.average(self.small_gradients, self.small_gradients)

    def squared_norm(self) -> Tensor:
        """Return this rank's share of the squared norm of all gradients; the shares add up over the ranks."""
        own = [self.gradients[self.procs.rank], *(part.grad for part in self.own_rows.values())]
        norms = torch.stack(torch._foreach_norm([*own, self.small_gradients]))
        return norms[:-1].square().sum() + norms[-1].square() / self.procs.world_size

    def send_rows(self) -> None:
        """Begin to send this rank's updated rows to all others; gather() ends it."""
        for p, part in self.own_rows.items():
            self.send(p.data, part.data)

    def gather(self) -> None:
        """Send each rank's updated weights to all others, and receive theirs."""
        if not self.sending:
            self.send_rows()
        self.send(self.weights, self.masters)
        while self.sending:
            work, sent, weights = self.sending.pop(0)
            work.wait()
            if self.has_masters:
                weights.copy_(sent)

    def send(self, weights: Tensor, masters: Tensor) -> None:
        """Begin an all-gather of weights, which all ranks hold, from each rank's piece of them, or its masters."""
        if not weights.numel():
            return
        sent = torch.empty_like(weights, dtype=self.gather_dtype) if self.has_masters else weights
        own = self.piece(sent)
        if self.has_masters:
            own.copy_(masters.view(own.shape))
        # NCCL takes the piece in its place; gloo does not
        work = all_gather(sent.view(-1), (own if own.is_cuda else own.clone()).view(-1), async_op=True)
        self.sending.append((work, sent, weights))


class Part(NamedTuple):
    """One parameter of Gathered. Padded: rows are added so that the ranks' pieces are equally long."""

    module: torch.nn.Module      # that has it ...
    name: str                    # ... by this name
    sharded: Tensor              # FSDP2's parameter, a DTensor
    local: Tensor                # this rank's rows of it, fp32
    weight: torch.nn.Parameter   # the whole parameter, which the model computes with; its `main_grad` sums gradients
    padded_weight: Tensor        # the memory of `weight`
    padded_gradient: Tensor      # the memory of `main_grad`, fp32


class Gathered(Buffers):
    """The whole weights of a model that FSDP2 shards, and sums of their gradients."""

    def __init__(self, model: torch.nn.Module, matrices: Iterable[Tensor], procs: Any, reduce_dtype: torch.dtype,
                 exact: torch.nn.Module | None = None):
        """Allocate weights and gradients, and gather the weights. All ranks must call this.

        The sharded parameters' gradients are from now on this rank's rows of the sums, and must stay in place.

        Args:
            model: sharded by FSDP2.
            matrices: parameters that Muon trains.
            procs: Processes.
            reduce_dtype: gradients are added over the ranks in it, fp32 or bf16.
            exact: module whose parameters are gathered in fp32; all others in bf16.
        """
        super().__init__(procs, reduce_dtype)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # its hooks gather weights and reduce gradients
                module._forward_pre_hooks.clear()
                module._forward_hooks.clear()
        self.parts, self.sending = [], []  # of gather(): what is being received
        exact = {id(p) for p in exact.parameters()} if exact else set()
        places = [(module, name, p) for module in model.modules() for name, p in module.named_parameters(recurse=False)]
        small = [p for *_, p in places if p.ndim == 1 or p.numel() < 2 ** 12]
        # Small ones are sent together
        self.small_gradients = torch.zeros(sum(self.padded_shape(p).numel() for p in small), device=procs.device)
        self.small_weights = torch.zeros(len(self.small_gradients), device=procs.device).view(procs.world_size, -1)
        small, offset = {id(p) for p in small}, 0
        for module, name, p in places:
            shape, dtype = self.padded_shape(p), torch.float32 if id(p) in exact else torch.bfloat16
            padded_weight = torch.zeros(shape, dtype=dtype, device=procs.device)
            if id(p) in small:
                gradient = self.small_gradients[offset:offset + shape.numel()].view(shape)
                offset += shape.numel()
            else:
                gradient = torch.zeros(shape, device=procs.device)
            weight, local = torch.nn.Parameter(padded_weight[:len(p)]), p.detach().to_local()
            weight.main_grad = gradient[:len(p)]
            weight.register_post_accumulate_grad_hook(add_to_main_grad)
            p.grad = DTensor.from_local(self.piece(gradient)[:len(local)], p.device_mesh, p.placements, run_check=False,
                                        shape=p.shape, stride=p.stride())
            self.parts.append(Part(module, name, p, local, weight, padded_weight, gradient))
        matrices = {id(p) for p in matrices}
        self.small = [part for part in self.parts if id(part.sharded) in small]
        large = [part for part in self.parts if id(part.sharded) not in small]
        self.rows, self.matrices = ([part for part in large if (id(part.sharded) in matrices) == of_muon]
                                    for of_muon in (False, True))
        self.gather()

    def padded_shape(self, p: Tensor) -> torch.Size:
        """Return the shape of a parameter with as many rows more as FSDP2 lacks on the last ranks."""
        ranks = self.procs.world_size
        return torch.Size([-(-len(p) // ranks) * ranks, *p.shape[1:]])

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the model hold the whole weights in a context. Outside of it, it cannot compute."""
        try:
            for part in self.parts:
                part.module._parameters[part.name] = part.weight
            yield
        finally:
            for part in self.parts:
                part.module._parameters[part.name] = part.sharded

    def zero_grad(self) -> None:
        """Set all gradients to zero, in place."""
        torch._foreach_zero_([self.small_gradients, *(part.padded_gradient for part in self.rows + self.matrices)])

    def reduce(self) -> None:
        """Average the gradients over the ranks: each rank gets those of its own rows."""
        if self.procs.world_size == 1:
            return
        for part in self.rows + self.matrices:
            self.average(part.padded_gradient.view(-1), self.piece(part.padded_gradient).view(-1))
        self.average(self.small_gradients, self.small_gradients)

    def squared_norm(self) -> Tensor:
        """Return the squared norm of the gradients of this rank's rows; it adds up over the ranks."""
        own = [self.piece(part.padded_gradient)[:len(part.local)] for part in self.parts if part.local.numel()]
        return torch.stack(torch._foreach_norm(own)).square().sum()

    def send_rows(self) -> None:
        """Begin to send this rank's rows of what AdamW updates to all others; gather() ends it."""
        self.send(self.rows)

    def gather(self) -> None:
        """Send this rank's rows of the updated weights to all others, and receive theirs."""
        if not self.sending:
            self.send_rows()
        self.send(self.matrices)
        if self.small:
            self.gather_small()
        while self.sending:
            self.sending.pop(0).wait()

    def send(self, parts: list[Part]) -> None:
        """Begin an all-gather of each of these weights."""
        if not parts:
            return
        own = [self.piece(part.padded_weight) for part in parts]
        torch._foreach_copy_([piece[:len(part.local)] for piece, part in zip(own, parts, strict=True)],
                             [part.local for part in parts])
        if self.procs.world_size == 1:
            return
        for piece, part in zip(own, parts, strict=True):
            # NCCL takes the piece in its place; gloo does not
            source = piece if piece.is_cuda else piece.clone()
            self.sending.append(all_gather(part.padded_weight.view(-1), source.view(-1), async_op=True))

    def gather_small(self) -> None:
        """Gather the small weights, in one message."""
        own, lengths = self.small_weights[self.procs.rank], [self.piece(p.padded_weight).numel() for p in self.small]
        pieces = zip(own.split(lengths), self.small, strict=True)
        torch._foreach_copy_([piece[:part.local.numel()] for piece, part in pieces],
                             [part.local.view(-1) for part in self.small])
        if self.procs.world_size > 1:
            all_gather(self.small_weights.view(-1), own if own.is_cuda else own.clone())
        torch._foreach_copy_([part.padded_weight.view(self.procs.world_size, -1) for part in self.small],
                             list(self.small_weights.split(lengths, dim=1)))


def add_to_main_grad(weight: Tensor) -> None:
    """Add the gradient that autograd has just made to weight.main_grad, and drop it; None: a matmul has added it."""
    if weight.grad is not None:
        weight.main_grad.add_(weight.grad)
        weight.grad = None


def with_grad(values: Tensor, grad: Tensor) -> torch.nn.Parameter:
    """Return a parameter with this gradient."""
    parameter = torch.nn.Parameter(values)
    parameter.grad = grad
    return parameter


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
