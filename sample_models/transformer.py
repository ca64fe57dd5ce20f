"""What the small GPT and the small translator have in common: attention, and a layer of it with its MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of ``x`` [B, T, width] on ``memory`` [B, S, width], by default on itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor | None = None, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """``mask`` is True where a position of the memory may be looked at, [B, 1, 1, S]."""
        memory = x if memory is None else memory
        q, k, v = (
            linear(source).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear, source in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        found: Tensor = self.out(mixed(q, k, v, mask, causal).transpose(1, 2).flatten(2))
        return found


def mixed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Scaled dot-product attention [B, heads, T, size]; in bf16 on a CPU, torch's own is four times slower on short rows."""
    if not torch.is_autocast_enabled("cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    found: Tensor = scores.softmax(-1).to(v.dtype) @ v
    return found


class Layer(nn.Module):
    """Attention on itself, attention on a memory if ``crossed``, and an MLP; each after a LayerNorm, beside a residual."""

    def __init__(self, width: int, heads: int, *, causal: bool = False, crossed: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width) if crossed else None
        self.cross = Attention(width, heads) if crossed else None
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, memory: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """``mask`` is that of the memory, or of ``x`` itself where there is no memory."""
        x = x + self.attention(self.norm(x), mask=None if self.causal else mask, causal=self.causal)
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), memory, mask=mask)
        found: Tensor = x + self.mlp(x)
        return found
