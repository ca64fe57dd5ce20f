"""Llama (Touvron et al. 2023) as Karpathy's tinyllamas have it: the module of ``stories260K.pt``.

    nmconvert eval stories260K.pt --model benchmarks/models/llama.py:stories260k --task language_model \\
        --data tinystories/test.npz --task-arg block=512      # of `benchmarks/data.py tinystories`: loss 1.461
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn


class Past:
    """Keys and values of all positions so far, in memory that doubles where it is full, so that few are ever copied."""

    def __init__(self) -> None:
        self.length, self.kept = 0, torch.empty(0)

    def joined(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``k`` and ``v`` [B, kv_heads, 1, size] of the next position, after those of all before."""
        if self.length == (self.kept.shape[3] if self.length else 0):
            room = torch.empty(2, *k.shape[:2], max(2 * self.length, 32), k.shape[3], dtype=k.dtype, device=k.device)
            if self.length:
                room[:, :, :, : self.length] = self.kept
            self.kept = room
        self.kept[0, :, :, self.length], self.kept[1, :, :, self.length] = k[:, :, 0], v[:, :, 0]
        self.length += 1
        keys, values = self.kept[:, :, :, : self.length]
        return keys, values


class Attention(nn.Module):
    """Causal, with rotary positions; ``kv_heads`` keys and values serve ``heads`` queries."""

    def __init__(self, width: int, heads: int, kv_heads: int, theta: float) -> None:
        super().__init__()
        self.size, self.theta, self.repeats = width // heads, theta, heads // kv_heads
        self.wq = nn.Linear(width, heads * self.size, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.size, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.size, bias=False)
        self.wo = nn.Linear(heads * self.size, width, bias=False)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """[B, T, width]; with ``past`` T is 1, and x follows the positions whose keys and values are there, and joins them."""
        first = past.length if past is not None else 0
        q, k, v = (w(x).unflatten(2, (-1, self.size)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = self.turned(q, first), self.turned(k, first)
        if past is None:
            k, v = (t.repeat_interleave(self.repeats, 1) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:  # the queries that share keys stand in a row, as positions do
            shared = q.unflatten(1, (-1, self.repeats)).squeeze(3)
            mixed = F.scaled_dot_product_attention(shared, *past.joined(k, v)).flatten(1, 2).unsqueeze(2)
        found: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return found

    def turned(self, x: Tensor, first: int = 0) -> Tensor:
        """``x`` [B, heads, T, size], each pair of neighbours turned by the angle of its position, counted from ``first``."""
        speed = self.theta ** -(torch.arange(0, self.size, 2, device=x.device) / self.size)
        angle = torch.arange(first, first + x.shape[2], device=x.device)[:, None] * speed
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()]
        return torch.stack(turned, -1).flatten(-2).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width]."""
        found: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return found


class Layer(nn.Module):
    """Attention and feed-forward, each after an RMSNorm, beside a residual."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int, eps: float, theta: float) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width, eps), nn.RMSNorm(width, eps)
        self.attention = Attention(width, heads, kv_heads, theta)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        """[B, T, width]."""
        x = x + self.attention(self.attention_norm(x), past)
        found: Tensor = x + self.feed_forward(self.ffn_norm(x))
        return found


class Llama(nn.Module):
    """``input_ids`` [B, T] → logits [B, T, vocabulary]; the output is tied to the embedding."""

    def __init__(self, vocab_size: int, width: int, hidden: int, depth: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.tok_embeddings = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(width, hidden, heads, kv_heads, 1e-5, 1e4) for _ in range(depth))
        self.norm = nn.RMSNorm(width, 1e-5)
        self.output = nn.Linear(width, vocab_size, bias=False)
        self.output.weight = self.tok_embeddings.weight

    def forward(self, input_ids: Tensor, past: list[Past] | None = None) -> Tensor:
        """The logits of what follows each position; ``past``, one a layer, is for telling token by token."""
        x = self.tok_embeddings(input_ids)
        for number, layer in enumerate(self.layers):
            x = layer(x, past and past[number])
        logits: Tensor = self.output(self.norm(x))
        return logits


def stories260k() -> Llama:
    """The module of ``stories260K.pt``."""
    return Llama(vocab_size=512, width=64, hidden=172, depth=5, heads=8, kv_heads=4)


@torch.inference_mode()
def told(checkpoint: Path, count: int, length: int, at_once: int = 256) -> list[NDArray[np.int64]]:
    """``count`` stories of at most ``length`` ids that the model of ``checkpoint`` tells, drawn at temperature 1, seed 0.

    A story begins with id 1, and ends before the next one. ``at_once`` are told side by side, until all have ended.
    """
    model, generator = stories260k().eval(), torch.Generator().manual_seed(0)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    stories: list[NDArray[np.int64]] = []
    while len(stories) < count:
        ids, past = torch.ones(min(at_once, count - len(stories)), 1, dtype=torch.int64), [Past() for _ in model.layers]
        while ids.shape[1] < length and not (ids[:, 1:] == 1).any(1).all():
            chances = model(ids[:, -1:], past)[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
        stories += [row[: [*row[1:], 1].index(1) + 1] for row in ids.numpy()]
    return stories
