"""Sizes that follow from the flags alone: parameters of each part of the model. Imports nothing, not even torch."""

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
