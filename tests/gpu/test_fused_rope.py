"""The Triton kernel of RoPE + QK norm against the plain version: values, gradients, layouts."""

import pytest
import torch

import train

SHAPE = dict(B=3, T=72, H=5, D=128)


def tables(T, D):
    angle = torch.outer(torch.arange(T).double(), 10000.0 ** (-torch.arange(D // 2).double() / (D // 2)))
    return angle.cos().float().cuda(), angle.sin().float().cuda()


def run(function, qkv, grads, cos, sin, H):
    leaf = qkv.clone().requires_grad_()
    outputs = function(leaf * 1, cos, sin, H, 1e-6)  # * 1: the kernel overwrites its input, which must not be a leaf
    torch.autograd.backward(outputs, [g.clone() for g in grads])
    return outputs, leaf.grad


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("together", [False, True])
def test_fused_rope_qk_norm_is_the_plain_one(together):
    """bf16 outputs are rounded once (2^-9); its gradient also reads the rounded outputs back. `together`: gradients of
    q, k and v that share one tensor, as attention returns them, are taken in place."""
    B, T, H, D = SHAPE.values()
    torch.manual_seed(0)
    cos, sin = tables(T, D)
    qkv = torch.randn(B, T, 3 * H * D, device="cuda").bfloat16()
    grads = torch.randn(B, T, 3, H, D, device="cuda").bfloat16()
    parts = grads.unbind(2) if together else [g.contiguous() for g in grads.unbind(2)]
    plain, plain_grad = run(train.rope_qk_norm, qkv, parts, cos, sin, H)
    leaf = qkv.clone().requires_grad_()
    fused = train.FusedRopeQKNorm.apply(leaf * 1, cos, sin, H, 1e-6)
    torch.autograd.backward(fused, parts if together else [g.clone() for g in parts])
    for a, b in zip(fused, plain):
        assert a.shape == (B, T, H, D) and relative(a, b) < 3e-3
    assert relative(leaf.grad, plain_grad) < 6e-3
    # one tensor, strides as TE's bs3hd layout wants them
    assert all(x.stride() == (T * 3 * H * D, 3 * H * D, D, 1) for x in fused)
    assert [x.storage_offset() for x in fused] == [0, H * D, 2 * H * D]
