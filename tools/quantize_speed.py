"""Time our Triton kernels that quantize and transpose FP8 against Transformer Engine's. Needs a GPU with FP8 and both.

    python tools/quantize_speed.py                       # writes results/<card>/quantize_speed.md
    python tools/quantize_speed.py --out=/tmp/table.md   # writes /tmp/table.md

The matrices are those of d20: gradients and activations of a micro-batch of 32,768 tokens, and a weight. Each figure is
the median of 50 replays of a CUDA graph, divided by the graph's calls, so that the host's time does not count. The
calls of a graph read different matrices, more than a GPU's L2 cache holds. Outputs are compared byte for byte first.
fused.py takes our kernels where cards.own_quantize() says so: on compute capability 12.x.
"""

import datetime
import pathlib
import statistics
import sys
from typing import Callable
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanofp8.config import explain_early_errors

if __name__ == "__main__":
    explain_early_errors(__file__)

import torch

from nanofp8 import fused
from nanofp8.config import OneLineParser, UserError, exit_with
from nanofp8.machine import card_name, describe_machine

E4M3, E5M2, BF16, FP32 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float32
COPIES_BYTES = 400 << 20  # of matrices that a graph reads: several times the L2 cache of any GPU so far
REPLAYS = 50

# What is timed: rows, columns, dtype, FP8 format, and what is made
CASES = (
    (32768, 1280, BF16, E5M2, "rows and cols"), (32768, 5120, BF16, E5M2, "rows and cols"),
    (32768, 1280, BF16, E4M3, "rows"), (1280, 5120, FP32, E4M3, "rows and cols"),
    (32768, 1280, E4M3, E4M3, "cols of rows"), (32768, 5120, E4M3, E4M3, "cols of rows"),
)


def make_call(x: torch.Tensor, scaling: fused.Scaling, makes: str) -> Callable[[], fused.Operands]:
    """Return the function to be timed, by fused.py: it quantizes x, or transposes x, which is FP8 already."""
    if makes == "cols of rows":
        return lambda: (fused.transposed(fused.Fp8(x, scaling.inverse)), None)
    return lambda: fused.quantize(x, scaling, colwise=makes == "rows and cols")


def microseconds(calls: list[Callable]) -> float:
    """Return the time of one call on the GPU."""
    for call in calls[:2]:  # compiles
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / len(calls))
    return statistics.median(times)


def compare(M: int, K: int, source: torch.dtype, dtype: torch.dtype, makes: str) -> dict[bool, float]:
    """Return the microseconds of one call, by whether our kernels run. Raises: UserError if the bytes differ."""
    amax, scale = torch.zeros(1, device="cuda"), torch.full((1,), 30.0, device="cuda")
    scaling = fused.Scaling(scale, 1 / scale, amax, dtype)
    scaling = scaling._replace(quantizer=fused.te_quantizer(scaling, makes == "rows and cols"))
    copies = max(2, COPIES_BYTES // (M * K * source.itemsize))
    calls = [make_call(torch.randn(M, K, device="cuda").to(source), scaling, makes) for _ in range(copies)]
    times, made = {}, {}
    for own in (False, True):
        with mock.patch.object(fused, "own_quantize", lambda own=own: own):
            amax.zero_()
            made[own] = [operand.data.view(torch.uint8) for operand in calls[0]() if operand is not None]
            made[own].append(amax.clone())
            times[own] = microseconds(calls)
    if not all(torch.equal(*pair) for pair in zip(made[False], made[True], strict=True)):
        raise UserError(f"{M} x {K}, {makes}: our kernel and Transformer Engine's differ")
    return times


def table() -> list[str]:
    """Return the rows of the table, as Markdown."""
    names = {E4M3: "E4M3", E5M2: "E5M2", BF16: "bf16", FP32: "fp32"}
    lines = ["| matrix | from | to | made | bytes moved | Transformer Engine | ours | ours by theirs |",
             "|---|---|---|---|---|---|---|---|"]
    for M, K, source, dtype, makes in CASES:
        times = compare(M, K, source, dtype, makes)
        moved = M * K * (source.itemsize + (2 if makes == "rows and cols" else 1))
        cells = [f"{times[own]:.1f} µs, {moved / times[own] / 1e3:,.0f} GB/s" for own in (False, True)]
        lines.append(f"| {M:,} x {K:,} | {names[source]} | {names[dtype]} | {makes} | {moved / 1e6:,.0f} MB | "
                     f"{' | '.join(cells)} | {times[True] / times[False]:.2f} |")
    return lines


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    if not fused.te_gemm() or fused.triton is None:
        raise UserError("it needs a GPU with FP8, Transformer Engine and Triton; run it where train.py trains in FP8")
    if not fused.needs_transposes():
        raise UserError("FP8 matmuls take any layout on this GPU, so it needs no transposes; use another kind")
    machine = describe_machine(torch.device("cuda", 0))
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = ["# Quantizing and transposing: our Triton kernels and Transformer Engine's",
             f"`python tools/quantize_speed.py`, {datetime.date.today()}, {machine['device']}, {versions}", "",
             "Time of one call on the GPU, and bytes that it moves. All outputs were equal, byte for byte.", "",
             *table()]
    out = pathlib.Path(args.out or ROOT / "results" / card_name() / "quantize_speed.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with(error, "quantize_speed.py")
