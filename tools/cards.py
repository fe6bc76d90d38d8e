"""
Print what each kind of GPU does with each number format, as nanofp8/cards.py knows it; or write it into docs/cards.md.

    python tools/cards.py            # print
    python tools/cards.py --write    # replace the table in docs/cards.md
"""

import pathlib
import sys
from typing import Any, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from nanofp8.config import explain_early_errors

if __name__ == "__main__":
    explain_early_errors(__file__)

from nanofp8 import cards
from nanofp8.config import OneLineParser, UserError, exit_with
from nanofp8.precision import FORMATS

PAGE = ROOT / "docs" / "cards.md"
BEGIN, END = "<!-- written by tools/cards.py -->\n", "<!-- end -->\n"


def decision_table(formats: Sequence[Any]) -> list[str]:
    """Return the table of cards and formats, and where its entries come from, as lines of Markdown.

    formats: those of precision.FORMATS, bf16 first, then the default.
    """
    bf16, default, *_ = formats

    def cell(chosen: Any, capability: tuple[int, int]) -> str:
        said = cards.verdict(chosen.question, capability, asked=chosen is not default)
        if said == "bf16":
            return "bf16 instead (1)"
        if said == "native" and chosen.fused:
            return "native, our kernels"
        if said == "native" and chosen.name == "fp8-block" and capability >= cards.MXFP8_FOR_BLOCK:
            return "native, as MXFP8 (2)"
        if said == "native" and chosen.name == "nvfp4" and cards.nvfp4_lacks(capability, cards.dotted(cards.TE_OLDEST)):
            return "native (3)"
        return "refused (4)" if said == "refused" else said

    columns = [*formats[1:], bf16]
    lines = [f"| cards | compute capability | {' | '.join(f.name for f in columns)} | has run |",
             "|---|---|" + "---|" * (len(columns) + 1)]
    for names, capability in cards.CARDS:
        cells = " | ".join(cell(f, capability) for f in columns)
        has_run = "yes" if capability in cards.HAS_RUN else "no"
        lines.append(f"| {names} | {cards.dotted(capability)} | {cells} | {has_run} |")
    recipe, oldest = default.name.removeprefix("fp8-"), cards.dotted(cards.NVFP4_OLDEST_12)
    lines += [
        "", "With the versions of `requirements.txt`. \"Emulated\" is slower than bf16.",
        f"1. If no flag asks for a format. `--USE_FP8=True` and `--FP8_RECIPE={recipe}` emulate it.",
        "2. Transformer Engine converts the scales and calls MXFP8's matmuls (`csrc/extensions/gemm.cpp:314`).",
        f"3. With Transformer Engine older than {oldest}, Hadamard transform and stochastic rounding are off "
        f"(`csrc/quantizer.cpp:1934`, `common/util/ptx.cuh:607`).",
        "4. Triton 3.6 cannot compile for it: its `ptxas` is of CUDA 12.9.", "",
        "| format | in hardware on compute capability | Transformer Engine's function | source |", "|---|---|---|---|"]
    for question, (source, needs) in cards.SUPPORT.items():
        names = ", ".join(f.name for f in formats if f.question == question)
        lines.append(f"| {names} | {'; '.join(map(str, needs))} | `{question}` | `{source}` |")
    return lines


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    text = "\n".join(decision_table(list(FORMATS.values()))) + "\n"
    if not parser.parse_args().write:
        print(text, end="")
        return
    page = PAGE.read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise UserError(f"{PAGE} must have one line {BEGIN.strip()} and one line {END.strip()}; put them back")
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with(error, "cards.py")
