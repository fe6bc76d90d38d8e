"""The epilogues of nanofp8/epilogues.py, and QuACK's matmuls that need none. Importing this module needs QuACK."""

import inspect

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32
from quack.activation import relu_sq
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.ops import ColVecReduce
from quack.gemm import gemm  # noqa: F401
from quack.gemm_symmetric import gemm_symmetric  # noqa: F401


# Called for each element: acc is the sum of products, c the element of the matmul's third operand; the rest are the
# arguments epi_args. f, g, h: factors of FP8 operands; s: scale of the FP8 result.
@gemm_epilogue(reduces={"amax": ColVecReduce("amax", combine="max_abs")})
def relu2(acc, f, g, s):
    v = relu_sq(acc * (f * g))
    return {"D": v * s, "amax": v}


@gemm_epilogue()
def relu2_bf16(acc):
    return {"D": relu_sq(acc)}


@gemm_epilogue()
def relu2_backward_bf16(acc, c):
    return {"D": acc * (2.0 * cute.math.sqrt(c, fastmath=True))}


@gemm_epilogue()
def plain(acc, f, g):
    return {"D": acc * (f * g)}


class ColVecSum(ColVecReduce):
    """ColVecReduce's sum without the columns beyond the last one, which a tile at the right edge has.

    ColVecReduce adds them: it takes them for 0. Their products are, but what the epilogue makes of 0 is not.
    """

    def config_key(self):
        """QuACK finds compiled kernels by this key. With the source in it, a changed source is compiled anew."""
        return *super().config_key(), inspect.getsource(type(self))

    def _mask_oob_active(self):
        return True

    @cute.jit
    def _mask_oob(self, frag, coords, limit, tile_shape_mn):
        """Set the elements of `frag` to 0 whose columns are not below `limit`; both are counted from the tile's edge.

        coords: coordinates of the elements. The branch is for speed, and without it registers spill.
        """
        if limit < tile_shape_mn[1]:
            columns = cute.composition(cute.make_layout(tile_shape_mn, stride=(0, 1)), coords.layout)
            own_limit = limit - coords[0][1]
            for i in cutlass.range(cute.size(frag), unroll_full=True):
                frag[i] = frag[i] if cute.crd2idx(i, columns) < own_limit else 0.0


# rate, depth: from epilogues.logits_matmul()
@gemm_epilogue(outs={"sums": ColVecSum("sums")})
def logits(acc, f, g, rate, depth):
    logit = (acc * (f * g)).to(BFloat16).to(Float32)
    share = cute.arch.rcp_approx(cute.math.exp2(rate * logit, fastmath=True) + 1.0)
    return {"D": logit, "sums": cute.math.exp2(depth * share, fastmath=True)}


@gemm_epilogue(outputs=("cols",), reduces={"amax": ColVecReduce("amax", combine="max_abs")})
def relu2_backward(acc, c, f, g, h, s):
    d = acc * (2.0 * f * g) * cute.math.sqrt(c * h, fastmath=True)
    return {"D": d * s, "cols": d * s, "amax": d}
