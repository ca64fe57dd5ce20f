"""A small GPT (Radford et al. 2019) on bytes; ``gpt.pt`` learned to write Python from the standard library's text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sample_models.transformer import Layer


class GPT(nn.Module):
    """``input_ids`` [B, T], T ≤ ``context`` → logits [B, T, vocabulary]; the output is tied to the embedding."""

    def __init__(self, vocab_size: int = 256, width: int = 96, depth: int = 3, heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.vocab_size, self.context = vocab_size, context
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """The logits of what follows each position."""
        x = self.embedding(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def gpt() -> GPT:
    """The model that ``gpt.pt`` belongs to."""
    return GPT()
