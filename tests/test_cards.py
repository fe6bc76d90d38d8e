"""cards.py: what each kind of GPU does with each format, against what train.py chooses and what docs/cards.md says.

With TE_SOURCE=/path/to/TransformerEngine also against Transformer Engine's own functions.
"""

import pytest
import support_vs_te

import helpers
import train
from helpers import GPU, ROOT, finish, make_cfg, start
from nanofp8 import cards, machine
from nanofp8.config import UserError
from nanofp8.precision import FORMATS

ASKED = {"bf16": dict(USE_FP8=False), "nvfp4": dict(USE_NVFP4=True),
         **{name: dict(FP8_RECIPE=name.removeprefix("fp8-")) for name in FORMATS if name.startswith("fp8-")}}
BY_CAPABILITY = {cards.dotted(card.capability): card.capability for card in cards.CARDS}


def choice(changes):
    """Return what select_precision() does with these flags, in the words of cards.verdict()."""
    cfg = make_cfg(n_embd=128, **changes)
    try:
        precision = train.select_precision(cfg, GPU)
    except UserError as error:
        assert "Triton" in str(error) and "ptxas" in str(error) and "\n" not in str(error) and error.status == 1
        return "refused"
    if precision.emulated:
        return "emulated"
    asked_for_bf16 = cfg.USE_FP8 is False and not cfg.USE_NVFP4
    return "bf16" if precision.name == "bf16" and not asked_for_bf16 else "native"


@pytest.mark.parametrize("capability", BY_CAPABILITY)
def test_train_py_chooses_what_the_table_says(monkeypatch, capability):
    """For each format, and for the default flags."""
    capability = BY_CAPABILITY[capability]
    if capability in cards.NO_TRITON:
        pytest.importorskip("triton")
    helpers.fake_transformer_engine(monkeypatch, capability=capability, available=lambda question: (
        cards.supports(question, capability), "" if cards.supports(question, capability) else "no."))
    for name, changes in ASKED.items():
        assert choice(changes) == cards.verdict(FORMATS[name].question, capability, asked=True), name
    assert choice({}) == cards.verdict(FORMATS["fp8-delayed"].question, capability, asked=False)


def test_the_table_knows_the_questions_of_all_formats():
    assert {f.question for f in FORMATS.values()} - {""} == set(cards.SUPPORT) == set(support_vs_te.FUNCTIONS)


@pytest.mark.parametrize("capability", [(8, 7), (8, 9), (9, 0), (12, 0), (11, 0), (14, 0)])
def test_triton_is_asked_about_unknown_gpus(monkeypatch, capability):
    """Triton 3.6 knows 8.7, which the table does not have, but neither 11.0 nor 14.0."""
    triton = pytest.importorskip("triton")
    if capability < (11, 0) or capability == (12, 0):
        machine.check_triton(capability)
    elif triton.__version__.startswith("3.6"):
        with pytest.raises(UserError, match=f"Triton 3.6.*{cards.dotted(capability)}.*TRITON_PTXAS_BLACKWELL_PATH"):
            machine.check_triton(capability)


def test_the_page_has_the_table():
    """If not, run `python tools/cards.py --write`."""
    result = finish(start(ROOT / "tools" / "cards.py", cwd=ROOT))
    assert result.code == 0 and result.out.startswith("| cards |"), result.err
    assert result.out in (ROOT / "docs" / "cards.md").read_text(encoding="utf-8")


@pytest.mark.skipif(support_vs_te.load() is None, reason="TE_SOURCE is not a checkout of TransformerEngine")
def test_transformer_engines_own_functions(monkeypatch):
    """They agree for every GPU and library, and stand where the table says."""
    module, lines = support_vs_te.load()
    assert support_vs_te.differences(module, monkeypatch) == []
    for question, function in support_vs_te.FUNCTIONS.items():
        assert cards.SUPPORT[question].source == f"pytorch/quantization.py:{lines[function]}"
    module, lines = support_vs_te.load("utils.py", [support_vs_te.ANY_LAYOUT])
    assert support_vs_te.layout_differences(getattr(module, support_vs_te.ANY_LAYOUT), monkeypatch) == []
    assert f"pytorch/utils.py:{lines[support_vs_te.ANY_LAYOUT]};" in cards.any_fp8_layout.__doc__


@pytest.mark.parametrize("version, numbers", [("2.20.2", (2, 20, 2)), ("2.14.0+1a2b", (2, 14, 0)), ("3", (3,)),
                                              ("2.21.0.dev0", (2, 21, 0)), ("unknown", ()), ("", ())])
def test_numbers_of_a_version(version, numbers):
    assert cards.version_numbers(version) == numbers
    assert bool(cards.unsupported_version(version)) == (() < numbers < (2, 17))


@pytest.mark.parametrize("version, fine", [("2.9.1+cu128", False), ("1.13", False), ("2.10.0a0+b4e4ee.nv25.12", True),
                                           ("2.10.0", True), ("2.13.0+cpu", True), ("3.0", True), ("", True)])
def test_versions_of_torch(version, fine):
    """torch 2.9 lacks addmm's out_dtype, which fused.py needs, and 2.8 torch.optim.Muon."""
    text = cards.old_torch(version)
    assert not text if fine else version in text and "2.10" in text


@pytest.mark.parametrize("capability, head, cudnn, words", [
    ((12, 0), 128, 91900, []), ((12, 0), 128, 91801, []), ((12, 0), 128, 91800, ["9.18.0", "9.18.1", "12.0"]),
    ((12, 1), 128, 91500, []), ((12, 1), 128, 90600, ["9.7.0"]), ((9, 0), 128, 90600, []),
    ((8, 9), 128, 91001, ["9.10.1", "9.10.2"]), ((12, 0), 128, 0, []),
    ((12, 0), 136, 91900, ["136", "128"]), ((12, 0), 100, 91900, ["100", "multiple of 8"]),
    ((9, 0), 192, 91900, []), ((9, 0), 264, 91900, ["256"]), ((8, 0), 192, 91900, ["128"]),
    ((10, 0), 256, 92300, []), ((10, 0), 256, 91900, ["128"]), ((10, 0), 192, 92300, ["128"]),
])
def test_fused_attention(capability, head, cudnn, words):
    """By Transformer Engine's list and cuDNN's frontend."""
    why = cards.unfused_attention(capability, head, cudnn)
    assert bool(why) == bool(words) and all(word in why for word in words)


@pytest.mark.parametrize("number, name", [(91801, "9.18.1"), (130400, "13.4.0"), (120103, "12.1.3")])
def test_versions_that_are_numbers(number, name):
    assert cards.version_name(number) == name
