"""Numbers that follow from the flags alone: parameters, FLOPs, windows, tokens of a step, micro-batches. No torch."""

import math
from types import SimpleNamespace

GATE_CHANNELS = 12  # values of a block's input that decide the gates of its value embedding, as in nanochat


def parameter_table(cfg: SimpleNamespace) -> list[tuple[str, int, str]]:
    """Return [(part of the model, its parameters, explanation)], which add up to all parameters."""
    n, width, vocab = cfg.n_layer, cfg.n_embd, cfg.vocab_size
    tables, channels = cfg.n_value_embed, min(GATE_CHANNELS, width)
    rows = [
        ("token embedding", vocab * width, f"{vocab} x {width}"),
        ("value embeddings", tables * (vocab * width + cfg.n_head * channels),
         f"{tables} x ({vocab} x {width} + gates: {cfg.n_head} x {channels})"),
        ("attention", n * 4 * width ** 2, f"{n} x (q, k, v, proj: 4 x {width}^2)"),
        ("MLP", n * 8 * width ** 2, f"{n} x (fc1, fc2: 2 x {width} x {4 * width})"),
        ("RMSNorm gains", (2 * n + 1) * width, f"(2 x {n} + 1) x {width}"),
        ("residual scalars", 2 * n if cfg.USE_X0 else 0, f"2 x {n}"),
        ("output head", vocab * width, f"{vocab} x {width}"),
    ]
    return [row for row in rows if row[1]]


def checkpoint_bytes(cfg: SimpleNamespace) -> int:
    """Return what a checkpoint takes on disk, about 1% too little: weights and optimizer state, without their headers.

    Weights are fp32. Muon keeps one fp32 moment of each weight of attention and MLP, AdamW two of all others; 8-bit
    AdamW keeps two bytes of each weight of embedding and head, and two fp32 scales per 256 weights.
    """
    parameters = {part: n for part, n, _ in parameter_table(cfg)}
    eight_bit = {"token embedding", "output head"} if cfg.USE_8BIT_ADAM else set()
    moments = sum(n * (4 if part in ("attention", "MLP") else 2 + 8 / 256 if part in eight_bit else 8)
                  for part, n in parameters.items())
    return round(4 * sum(parameters.values()) + moments)


def windows(cfg: SimpleNamespace) -> list[int]:
    """Return how many tokens each block attends to, itself included; block_size: all before it.

    cfg.window_pattern is repeated over the blocks; the last block always attends to all.
    """
    pattern = cfg.window_pattern
    sizes = [cfg.block_size if pattern[i % len(pattern)] == "L" else min(cfg.window_size, cfg.block_size)
             for i in range(cfg.n_layer)]
    return [*sizes[:-1], cfg.block_size]


def flops_per_token(cfg: SimpleNamespace) -> float:
    """Return the training FLOPs of one token: 6 x matmul parameters + 12 x width x pairs of tokens that attention
    compares, those of the causal half or of the window only."""
    matmul_parameters = cfg.n_layer * 12 * cfg.n_embd ** 2 + cfg.vocab_size * cfg.n_embd
    pairs = sum(window - window ** 2 / (2 * cfg.block_size) for window in windows(cfg))  # a token, mean over positions
    return 6 * matmul_parameters + 12 * cfg.n_embd * pairs


def auto_batch(train_tokens: int) -> int:
    """Return the tokens per step for a run of this length: the power of two nearest to 65,536 x (length / 70M)^0.383.

    65,536 was the best of 32,768, 65,536 and 131,072 at 70M tokens (docs/recipe.md); the exponent is nanochat's.
    """
    return 2 ** max(0, round(math.log2(65536 * (train_tokens / 70e6) ** 0.383)))


def batch_sizes(cfg: SimpleNamespace, ranks: int, multiple: int = 1) -> list[int]:
    """Return the micro-batches up to cfg.batch_size that divide a step, largest first; [] if none does.

    Those that do not have a multiple of `multiple` tokens are left out, if others are left.
    """
    sequences, rest = divmod(cfg.total_batch_size, ranks * cfg.block_size)
    sizes = [] if rest or not sequences else [n for n in range(min(cfg.batch_size, sequences), 0, -1)
                                             if sequences % n == 0]
    return [n for n in sizes if n * cfg.block_size % multiple == 0] or sizes
