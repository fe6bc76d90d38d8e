"""The epilogues of nanofp8/epilogues.py. Importing this module needs QuACK."""

import cutlass.cute as cute
from quack.activation import relu_sq
from quack.epilogue.frontend import gemm_epilogue
from quack.epilogue.ops import ColVecReduce


# Called for each element: acc is the sum of products, c the element of the matmul's third operand; the rest are the
# arguments epi_args. f, g, h: factors of FP8 operands; s: scale of the FP8 result.
@gemm_epilogue(reduces={"amax": ColVecReduce("amax", combine="max_abs")})
def relu2(acc, f, g, s):
    v = relu_sq(acc * (f * g))
    return {"D": v * s, "amax": v}


@gemm_epilogue(outputs=("cols",), reduces={"amax": ColVecReduce("amax", combine="max_abs")})
def relu2_backward(acc, c, f, g, h, s):
    d = acc * (2.0 * f * g) * cute.math.sqrt(c * h, fastmath=True)
    return {"D": d * s, "cols": d * s, "amax": d}
