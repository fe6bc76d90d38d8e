"""The bit-for-bit table: te_emulation.py's quantizers against Transformer Engine's, over all cases of the tests.

    python tests/gpu/bit_for_bit.py                         # a GPU with FP8 and TE: writes results/bit_for_bit.{json,md}
    TE_SOURCE=/path/to/TransformerEngine python tests/gpu/bit_for_bit.py --out=/tmp/table    # no GPU: NVFP4's reference alone

FP8: TE's CUDA quantizers. NVFP4: TE's reference NVFP4QuantizerRef. The comparisons are those of test_te_vs_emulation.py
and test_nvfp4_reference.py; here they are counted rather than asserted.
"""

import argparse
import collections
import datetime
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
for folder in (str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from nanofp8.machine import describe_machine  # noqa: E402
import torch  # noqa: E402

import nvfp4_reference  # noqa: E402

SOURCES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def count_fp8(te):
    """{(quantizer, format, source): {case: {tensor: [elements, differing]}}} of TE's CUDA quantizers."""
    import test_te_vs_emulation as tests
    table, found = {}, {}

    def record(**pairs):  # in place of the tests' assertion
        for name, (theirs, ours) in pairs.items():
            total, differ = found.setdefault(name, [0, 0])
            found[name] = [total + ours.numel(), differ + tests.count_mismatches(theirs, ours)]

    tests.check = record
    quantizers = {
        "delayed scaling": tests.test_delayed_quantizer_bit_for_bit, "current scaling": tests.test_current_quantizer_bit_for_bit,
        "blocks of 1x128": lambda *a: tests.test_block_quantizer_bit_for_bit(a[0], 1, *a[1:]),
        "blocks of 128x128": lambda *a: tests.test_block_quantizer_bit_for_bit(a[0], 2, *a[1:]),
    }
    if te.is_mxfp8_available():
        quantizers["MXFP8, 1x32"] = tests.test_mxfp8_quantizer_bit_for_bit
    for quantizer, compare in quantizers.items():
        for fmt, fp8 in (("E4M3", tests.E4M3), ("E5M2", tests.E5M2)):
            for source, dtype in SOURCES.items():
                for case in tests.CASES:
                    found = {}
                    compare(te, case, dtype, fp8)
                    table.setdefault((quantizer, fmt, source), {})[case] = found
    return table


def count_nvfp4(reference, device):
    """The same of NVFP4, against the reference."""
    table = {}
    for name, how in (("NVFP4, 1x16", {}), ("NVFP4, 16x16", {"two_d": True}), ("NVFP4, 1x16, Hadamard", {"rht": True})):
        for source, dtype in SOURCES.items():
            if "rht" in how and source == "fp32":
                continue  # the transform is of bf16 values
            for case in (nvfp4_reference.RHT_CASES if "rht" in how else nvfp4_reference.CASES) + ("minus zero", "nan"):
                theirs, ours = nvfp4_reference.quantize_both(reference, nvfp4_reference.values(case, dtype, device), **how)
                table.setdefault((name, "E2M1", source), {})[case] = {
                    n: [ours[n].numel(), int((theirs[n] != ours[n]).sum())] for n in ours}
    return table


EXPLAINED = """
Differences, all in NVFP4 against the reference, where TE's CUDA kernels do as the emulation does (source: core_nvfp4.cuh):
- minus zero: the reference turns -0 into +0; the kernels' conversion keeps the sign. The products are the same.
- nan: the reference's amax becomes NaN, and with it every code; the kernels take the amax by fmaxf, which skips a NaN.
- Hadamard: a bf16 matmul of 16 terms, whose fp32 sums may be taken in another order; a sum in another last bit can move
  the amax, and with it all scales. (A CPU's bf16 matmul also takes subnormal products for 0: those cases are left out.)
NaNs of either sign count as equal. The reference has no stochastic rounding: tests/test_emulation.py shows that it only
ever gives one of the two neighbours, without bias. MXFP8 is compared where the GPU has it (B200).
"""


def markdown(table, head):
    lines = [head, "", "| quantizer | format | from | cases | tensors' elements compared | differ | where |", "|---|---|---|---|---|---|---|"]
    for (quantizer, fmt, source), cases in table.items():
        total = sum(n for found in cases.values() for n, _ in found.values())
        where = collections.Counter({case: sum(d for _, d in found.values()) for case, found in cases.items()})
        where = {case: d for case, d in where.items() if d}
        lines.append(f"| {quantizer} | {fmt} | {source} | {len(cases)} | {total:,} | {sum(where.values()):,} | "
                     + ", ".join(f"{case} {d:,}" for case, d in where.items()) + " |")
    return "\n".join(lines) + "\n" + EXPLAINED


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "results" / "bit_for_bit"))
    args = parser.parse_args()
    reference, table = nvfp4_reference.load(), {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        import transformer_engine.pytorch as te
        table |= count_fp8(te)
    if reference is None and not table:
        sys.exit("bit_for_bit.py: error: no GPU with Transformer Engine, and TE_SOURCE names no checkout of TransformerEngine")
    if reference is not None:
        table |= count_nvfp4(reference, device)
    machine = describe_machine(device)
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    head = f"# Quantizers, bit for bit\n`python tests/gpu/bit_for_bit.py`, {datetime.date.today()}, {machine['device']}, {versions}"
    text = markdown(table, head)
    pathlib.Path(args.out + ".md").write_text(text)
    pathlib.Path(args.out + ".json").write_text(json.dumps({" | ".join(k): v for k, v in table.items()}) + "\n")
    print(text)


if __name__ == "__main__":
    main()
