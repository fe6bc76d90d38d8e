"""The choice of attention, and each against float64: on a GPU the real ones, on a CPU a stand-in for flash-attn-4."""

import importlib.util
import os
from types import SimpleNamespace

import pytest
import torch

from nanofp8 import attention, te_emulation
from nanofp8.attention import CausalAttention, choose_attention, make_attention
from nanofp8.config import UserError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, T, H, D = (2, 24, 3, 16) if DEVICE == "cpu" else (2, 512, 10, 128)


def flags(**changes):
    return SimpleNamespace(**dict(attention="auto", n_embd=H * D, n_head=H, window_pattern="L", block_size=T,
                                  qk_scale=1.2, n_layer=2, window_size=4) | changes)


def reference(q, k, v, window, scale):
    """Causal attention within a window, (B, T, H * D), in the inputs' dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    scores = (q @ k.mT * scale).masked_fill((distance < 0) | (distance >= (window or T)), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class PlainFlash:
    """The two functions of flash_attn.cute.interface that are used, in plain PyTorch."""

    @staticmethod
    def _flash_attn_fwd(q, k, v, return_lse, softmax_scale, causal, window_size_left=None, window_size_right=None):
        assert return_lse and causal and window_size_right in (None, 0)
        window = None if window_size_left is None else window_size_left + 1
        return reference(q, k, v, window, softmax_scale).view(q.shape).contiguous(), q.new_zeros(B, H, T), None

    @staticmethod
    def _flash_attn_bwd(q, k, v, out, d_out, lse, dq, dk, dv, **options):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            again, *_ = PlainFlash._flash_attn_fwd(*leaves, True, **options)
        again.backward(d_out)
        for out, leaf in zip((dq, dk, dv), leaves, strict=True):
            out.copy_(leaf.grad)


def use_flash4(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "flash4", lambda: (PlainFlash, "flash-attn-4 in plain PyTorch"))
    elif not attention.flash4()[0] or torch.cuda.get_device_capability()[0] < 9:
        pytest.skip(attention.flash4()[1])


@pytest.mark.parametrize("name, window", [("flash4", None), ("flash4", 7), ("torch", None)])
def test_attention_and_its_gradients(name, window, monkeypatch):
    if name == "flash4":
        use_flash4(monkeypatch)
    core, scale = CausalAttention(name, window, 0.3), 0.3
    generator = torch.Generator().manual_seed(0)
    qkv, d_out = (torch.randn(B, T, n, H, D, generator=generator).to(DEVICE, torch.bfloat16) for n in (3, 1))
    d_out = d_out.view(B, T, H * D)
    leaf = qkv.clone().requires_grad_()
    q, k, v = leaf.unbind(2)
    grads = []
    for x in (q, k, v):
        x.register_hook(grads.append)
    out = core(q, k, v)
    assert out.shape == (B, T, H * D) and out.dtype == torch.bfloat16
    out.backward(d_out)
    exact = qkv.double().requires_grad_()
    expected = reference(*exact.unbind(2), window, scale)
    expected.backward(d_out.double())
    assert (out - expected).norm() < 6e-3 * expected.norm()
    assert (leaf.grad - exact.grad).norm() < 1e-2 * exact.grad.norm()
    if name == "flash4":  # RoPE's gradient reads them without a copy
        assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 1
        assert sorted(grad.storage_offset() for grad in grads) == [0, H * D, 2 * H * D]


def test_the_window_and_the_scale_that_the_flags_ask_for(monkeypatch):
    use_flash4(monkeypatch)
    cfg, inputs = flags(window_pattern="SL"), [torch.randn(B, T, H, D).to(DEVICE, torch.bfloat16) for _ in range(3)]
    scale = 1.2 ** 2 * D ** -0.5
    for window, limit in ((5, 5), (T, None)):
        core = make_attention(cfg, "flash4", window, te_emulation)
        expected = reference(*(x.double() for x in inputs), limit, scale)
        assert (core(*inputs) - expected).norm() < 6e-3 * expected.norm()
        if DEVICE == "cpu":
            emulated = make_attention(cfg, "te", window, te_emulation)
            assert (emulated(*inputs) - expected).norm() < 6e-3 * expected.norm()


@pytest.mark.parametrize("capability, installed, head, wanted, chosen", [
    ((9, 0), True, 128, "auto", "flash4"), ((9, 0), True, 128, "cudnn", "te"), ((9, 0), True, 128, "torch", "torch"),
    ((9, 0), False, 128, "auto", "te"), ((9, 0), True, 80, "auto", "te"), ((9, 0), False, 128, "flash4", None),
    ((12, 0), True, 128, "auto", "te"), ((12, 0), True, 128, "flash4", "flash4"), ((8, 0), True, 128, "flash4", None),
    (None, True, 128, "auto", "te"), (None, True, 128, "flash4", None), (None, True, 128, "torch", "torch"),
])
def test_choice(capability, installed, head, wanted, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "flash4", lambda: (PlainFlash, "flash-attn-4 4.0") if installed else (None, "gone"))
    monkeypatch.setattr(attention, "TRIED", ((9, 0),))
    device = torch.device("cuda" if capability else "cpu")
    cfg = flags(attention=wanted, n_embd=2 * head, n_head=2)
    if chosen is None:
        with pytest.raises(UserError, match="flash4.*--attention=auto"):
            choose_attention(cfg, device, False)
    else:
        name, text, _ = choose_attention(cfg, device, False)
        assert name == chosen and text
        if capability and wanted == "auto":
            assert ("gone" in text) == (not installed)


@pytest.mark.parametrize("capability, cudnn, head, pattern, words", [
    ((12, 0), 91500, 128, "L", ["9.15.0", "9.18.1", "--attention=torch", "update cuDNN"]),
    ((12, 0), 91500, 128, "SL", ["--window_pattern=L"]), ((12, 0), 91900, 192, "L", ["192", "--attention=torch"]),
    ((12, 0), 91900, 128, "L", []), ((9, 0), 91900, 192, "L", []),
])
@pytest.mark.parametrize("wanted", ["auto", "cudnn"])
def test_a_warning_where_cudnn_has_no_fused_attention(capability, cudnn, head, pattern, words, wanted, monkeypatch):
    """Only if Transformer Engine's attention runs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    cfg, device = flags(attention=wanted, n_embd=2 * head, n_head=2, window_pattern=pattern), torch.device("cuda")
    name, _, warning = choose_attention(cfg, device, False)
    assert name == "te" and bool(warning) == bool(words) and all(word in warning for word in words)
    for other in (device, torch.device("cpu")):  # where Transformer Engine is emulated
        if wanted == "auto":
            assert not choose_attention(cfg, other, True)[2]
        else:
            with pytest.raises(UserError, match="attention='cudnn'.*--attention=auto"):
                choose_attention(cfg, other, True)


def test_torch_has_no_windows():
    with pytest.raises(UserError, match="--window_pattern=L"):
        choose_attention(flags(attention="torch", window_pattern="SL"), torch.device("cpu"), True)
    for unused in (dict(window_size=T), dict(n_layer=1)):
        cfg = flags(attention="torch", window_pattern="SL", **unused)
        assert choose_attention(cfg, torch.device("cpu"), True)[0] == "torch"


@pytest.mark.parametrize("given, value", [(None, "0"), ("1", "1")])
def test_transformer_engine_does_not_take_flash_attn_4(monkeypatch, given, value):
    """By TE's calls, flash-attn-4 4.0.0b36 gives zeros. What the user sets counts."""
    monkeypatch.setenv("NVTE_FLASH_ATTN_V4", given or "")
    if given is None:
        del os.environ["NVTE_FLASH_ATTN_V4"]
    spec = importlib.util.find_spec("nanofp8.attention")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert os.environ["NVTE_FLASH_ATTN_V4"] == value
