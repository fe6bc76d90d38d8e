"""Compare te_emulation.py's quantizers with Transformer Engine's, bit for bit, over all cases of the tests.

    python tools/bit_for_bit.py                       # on a GPU with FP8 and Transformer Engine
    python tools/bit_for_bit.py --out=/tmp/table      # write /tmp/table.json and /tmp/table.md
    TE_SOURCE=/path/to/TransformerEngine python tools/bit_for_bit.py       # without a GPU: NVFP4's reference alone

Writes results/<card>/bit_for_bit.json and .md (<card>: h100, h200, ..., or cpu). FP8 is compared with Transformer
Engine's CUDA quantizers, NVFP4 with its reference NVFP4QuantizerRef. The comparisons are those of
tests/gpu/test_te_vs_emulation.py and tests/test_nvfp4_reference.py; here the differences are counted instead of
asserted. Needs pytest.
"""

import argparse
import collections
import datetime
import json
import pathlib
import sys
from types import ModuleType

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "gpu")]

from nanofp8.config import explain_early_errors

if __name__ == "__main__":
    explain_early_errors(__file__)

import nvfp4_reference
import torch

from nanofp8.machine import card_name, describe_machine

SOURCES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# {(quantizer, format, source): {case: {tensor: [elements, differing elements]}}}
Table = dict[tuple[str, str, str], dict[str, dict[str, list[int]]]]


def count_fp8(te: ModuleType) -> Table:
    """Count the differences from Transformer Engine's CUDA quantizers."""
    import test_te_vs_emulation as tests
    table, found = {}, {}

    def record(**pairs):  # takes the place of the tests' assertion
        for name, (theirs, ours) in pairs.items():
            total, differ = found.setdefault(name, [0, 0])
            found[name] = [total + ours.numel(), differ + tests.count_mismatches(theirs, ours)]

    tests.check = record
    quantizers = {
        "delayed scaling": tests.test_delayed_quantizer_bit_for_bit,
        "current scaling": tests.test_current_quantizer_bit_for_bit,
        "blocks of 1x128": lambda te, *rest: tests.test_block_quantizer_bit_for_bit(te, 1, *rest),
        "blocks of 128x128": lambda te, *rest: tests.test_block_quantizer_bit_for_bit(te, 2, *rest),
    }
    if te.is_mxfp8_available():
        quantizers["MXFP8, 1x32"] = tests.test_mxfp8_quantizer_bit_for_bit
    for quantizer, compare in quantizers.items():
        for fp8_format, fp8 in (("E4M3", tests.E4M3), ("E5M2", tests.E5M2)):
            for source, dtype in SOURCES.items():
                for case in tests.CASES:
                    found.clear()
                    compare(te, case, dtype, fp8)
                    table.setdefault((quantizer, fp8_format, source), {})[case] = dict(found)
    return table


def count_nvfp4(reference: ModuleType, device: torch.device) -> Table:
    """Count the differences from Transformer Engine's reference of NVFP4."""
    table = {}
    for name, how in (("NVFP4, 1x16", {}), ("NVFP4, 16x16", {"two_d": True}), ("NVFP4, 1x16, Hadamard", {"rht": True})):
        for source, dtype in SOURCES.items():
            if "rht" in how and source == "fp32":
                continue  # the transform takes bf16 values
            cases = nvfp4_reference.RHT_CASES if "rht" in how else nvfp4_reference.CASES
            for case in (*cases, "minus zero", "nan"):
                theirs, ours = nvfp4_reference.quantize_both(
                    reference, nvfp4_reference.values(case, dtype, device), **how)
                table.setdefault((name, "E2M1", source), {})[case] = {
                    tensor: [ours[tensor].numel(), int((theirs[tensor] != ours[tensor]).sum())] for tensor in ours}
    return table


EXPLAINED = """
All differences are between the emulation and TE's NVFP4 reference. In these cases, TE's CUDA kernels do what the emulation does (source: core_nvfp4.cuh):
- minus zero: the reference turns -0 into +0. The kernels' conversion keeps the sign. The products are the same.
- nan: the reference's amax becomes NaN, and so does every code. The kernels take the amax with fmaxf, which skips a NaN.
- Hadamard: the transform is a bf16 matmul of 16 terms. Its fp32 sums may be taken in another order. If a sum's last bit differs,
  the amax can change, and with it all scales. (A CPU's bf16 matmul also treats subnormal products as 0. Those cases are left out.)

NaNs of either sign count as equal. The reference has no stochastic rounding; tests/test_emulation.py shows that the emulation's gives only
one of the two neighbours, without bias. MXFP8 is compared if the GPU has it (B200).
"""  # noqa: E501


def markdown(table: Table, head: str) -> str:
    """Return the table as Markdown, with `head` above it and the explanation below."""
    lines = [head, "", "| quantizer | format | from | cases | tensors' elements compared | differ | where |",
             "|---|---|---|---|---|---|---|"]
    for (quantizer, number_format, source), cases in table.items():
        total = sum(elements for found in cases.values() for elements, _ in found.values())
        counts = collections.Counter({case: sum(n for _, n in found.values()) for case, found in cases.items()})
        where = ", ".join(f"{case} {count:,}" for case, count in counts.items() if count)
        lines.append(f"| {quantizer} | {number_format} | {source} | {len(cases)} | {total:,} | "
                     f"{sum(counts.values()):,} | {where} |")
    return "\n".join(lines) + "\n" + EXPLAINED


def main() -> None:
    """Count, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "results" / card_name() / "bit_for_bit"),
                        help="path of the two files, without .json or .md")
    args = parser.parse_args()
    reference, table = nvfp4_reference.load(), {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        import transformer_engine.pytorch as te
        table |= count_fp8(te)
    if reference is not None:
        table |= count_nvfp4(reference, device)
    if not table:
        sys.exit("bit_for_bit.py: error: there is no GPU with Transformer Engine; "
                 "set TE_SOURCE to a checkout of TransformerEngine to compare NVFP4 alone")
    machine = describe_machine(device)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    head = (f"# Quantizers, bit for bit\n`python tools/bit_for_bit.py`, {datetime.date.today()}, {machine['device']}, "
            f"{versions}")
    text = markdown(table, head)
    out = pathlib.Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(f"{out}.md").write_text(text)
    pathlib.Path(f"{out}.json").write_text(json.dumps({" | ".join(key): cases for key, cases in table.items()}) + "\n")
    print(text)


if __name__ == "__main__":
    main()
