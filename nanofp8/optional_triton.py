"""Triton and our kernels, both None where Triton cannot be imported: then plain PyTorch and Dion's functions serve."""

try:
    import triton
except Exception:  # only some builds of torch bring it, and it may be broken
    triton = kernels = None
else:
    from nanofp8 import kernels

__all__ = ["kernels", "triton"]
