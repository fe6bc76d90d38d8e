"""Count the memory that fused blocks take, without a GPU: the model runs on the meta device, which has no data.

Tensors are counted from the operation that makes them until nothing refers to them any more. Triton kernels are left
out, since they allocate nothing. Matmuls and quantizers of Transformer Engine are replaced by what they return.
"""

import contextlib
import gc
import weakref
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from nanofp8 import epilogues, fused, loss, parts
from nanofp8 import te_emulation as te
from nanofp8.precision import FORMATS, Precision

META = torch.device("meta")


class Counter(TorchDispatchMode):
    """Count the bytes of all tensors that are alive: `now`, and the most so far, `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage):
        key = storage._cdata
        if key not in self.known:
            self.known[key] = -(-storage.nbytes() // 512) * 512  # torch's allocator rounds up to this
            self.now += self.known[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key)

    def drop(self, key):
        self.now -= self.known.pop(key)


class Attention(torch.autograd.Function):
    """Save and return what cuDNN's attention does."""

    @staticmethod
    def forward(ctx, q, k, v):
        B, T, H, D = q.shape
        out, log_sum_exp = torch.empty(B, T, H * D, dtype=q.dtype, device=META), torch.empty(B, H, T, device=META)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, *_ = ctx.saved_tensors
        return tuple(torch.empty(*q.shape[:2], 3, *q.shape[2:], dtype=q.dtype, device=META).unbind(2))


class Core(torch.nn.Module):
    def forward(self, q, k, v):
        return Attention.apply(q, k, v)


class NoKernels:
    """Stands for a module of Triton kernels or of QuACK's: kernel[grid](...) and kernel.gemm(...) do nothing."""

    def __getattr__(self, name):
        return self

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **options):
        pass


def matmul(a, b, dtype=torch.bfloat16, out=None, **_):
    a, b = (x.data if isinstance(x, fused.Fp8) else x for x in (a, b))
    return torch.empty(a.shape[0], b.shape[0], dtype=dtype, device=META) if out is None else out


def te_quantizer(scaling, colwise=True):
    def quantize(x):
        data, transpose = (torch.empty(shape, dtype=torch.uint8, device=META) for shape in (x.shape, x.shape[::-1]))
        return SimpleNamespace(_data=data, _transpose=transpose if colwise else None)

    return quantize


@contextlib.contextmanager
def fake_gpu(quack):
    """Let train.py's fused blocks and head run on the meta device as on a GPU with FP8. quack: epilogues.Quack."""
    transpose = SimpleNamespace(fp8_transpose=lambda data, *_, **__: torch.empty(data.shape[::-1], dtype=torch.uint8,
                                                                                device=META))
    stubs = dict(te_gemm=lambda: True, te_types=lambda: ({torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}, transpose),
                 te_quantizer=te_quantizer, matmul=matmul, kernels=NoKernels(), needs_transposes=lambda: True,
                 own_quantize=lambda: False)
    with contextlib.ExitStack() as stack:
        for module in (fused, loss, parts):
            for name in stubs.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, stubs[name]))
        for module in (train, fused):
            stack.enter_context(mock.patch.object(module, "kernels_fit", lambda *_: True))
        stack.enter_context(mock.patch.object(epilogues, "library", lambda: (NoKernels(), "")))
        stack.enter_context(mock.patch.object(train, "choose_quack", lambda *_: (quack, "")))
        is_cuda, torch.Tensor.is_cuda = torch.Tensor.__dict__.get("is_cuda"), property(lambda tensor: True)
        try:
            yield
        finally:
            del torch.Tensor.is_cuda
            if is_cuda is not None:
                torch.Tensor.is_cuda = is_cuda


def build(cfg):
    """Return train.py's model with fused blocks, and what they read of Transformer Engine's layers."""
    fp8 = cfg.USE_FP8
    precision = Precision(te, FORMATS["fp8-delayed" if fp8 else "bf16"], None, False, "")
    model = train.GPT(cfg, precision, lambda f: f, META)
    state = SimpleNamespace(is_fp8_enabled=lambda: fp8, reduce_and_update_fp8_tensors=lambda **_: None)
    model.te = SimpleNamespace(quantization=SimpleNamespace(FP8GlobalStateManager=state))
    for block in model.blocks:
        block.attn.core = Core()
        for layer, gemms in ((block.attn.qkv, 1), (block.attn.proj, 1), (block.mlp, 2)):
            layer.fp8, layer.prepare_forward, layer.end_forward = fp8, lambda *_, **__: None, lambda: None
            layer.fp8_meta = {key: SimpleNamespace(scale=torch.ones(count * gemms, device=META),
                                                   amax_history=torch.zeros(4, count * gemms, device=META))
                              for key, count in (("scaling_fwd", 3), ("scaling_bwd", 2))}
    return model


def count(cfg, quack=epilogues.NO_QUACK):
    """Return the bytes of weights, gradients, copies and activations at the peak of a step's second micro-batch, and
    what an evaluation takes besides weights, gradients and copies."""
    gc.collect()
    with fake_gpu(quack), Counter() as counter:
        model = build(cfg)
        x = torch.zeros(cfg.batch_size, cfg.block_size, dtype=torch.int32, device=META)
        y = torch.zeros(x.shape, dtype=torch.int64, device=META)
        for first in (True, False):
            counter.peak = 0
            model(x, y, first=first, in_place="add").backward()
        peak, resident = counter.peak, counter.now
        counter.peak = 0
        with torch.no_grad():
            model(x, y)
        return peak, counter.peak - resident
