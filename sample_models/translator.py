"""A small encoder–decoder (Vaswani et al. 2017) for translation, with Hugging Face's names for what goes in.

``translator.pt`` translates the sentences of `sample_models.sentences` from English to German; ``tokenizer.json`` is its
vocabulary of words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sample_models.transformer import Layer

PAD, START, END = 0, 1, 2  # their places in every tokenizer.json that train_text.py and the benchmarks write


class Translator(nn.Module):
    """One vocabulary for both languages; the output is tied to the embedding."""

    def __init__(
        self, vocab_size: int, width: int = 64, depth: int = 2, heads: int = 4, length: int = 64, dropout: float = 0.0
    ):
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, width, padding_idx=PAD)
        self.positions = nn.Embedding(length, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.decoder = nn.ModuleList(Layer(width, heads, causal=True, crossed=True) for _ in range(depth))
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        for table in (self.embedding, self.positions):
            nn.init.normal_(table.weight, std=width**-0.5)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, vocabulary] after each of ``decoder_input_ids`` [B, T], or of ``labels`` moved right by one."""
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("give labels or decoder_input_ids, or call generate()")
            decoder_input_ids = F.pad(labels[:, :-1].clamp(min=PAD), (1, 0), value=START)
        seen = attention_mask[:, None, None].bool()
        return self.decode(decoder_input_ids, self.encode(input_ids, seen), seen)

    def encode(self, input_ids: Tensor, seen: Tensor) -> Tensor:
        """The memory [B, S, width]; ``seen`` [B, 1, 1, S] is False for padding."""
        x = self.embed(input_ids)
        for layer in self.encoder:
            x = layer(x, mask=seen)
        memory: Tensor = self.encoder_norm(x)
        return memory

    def decode(self, ids: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
        """Logits [B, T, vocabulary]."""
        x = self.embed(ids)
        for layer in self.decoder:
            x = layer(x, memory, mask=seen)
        logits: Tensor = self.head(self.decoder_norm(x))
        return logits

    def embed(self, ids: Tensor) -> Tensor:
        """Words and their places."""
        places = self.positions(torch.arange(ids.shape[1], device=ids.device))
        embedded: Tensor = self.dropout(self.embedding(ids) * self.embedding.embedding_dim**0.5 + places)
        return embedded

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int = 63) -> Tensor:
        """The likeliest words, one after the other: ids [B, ≤ max_new_tokens + 1], the start first."""
        seen = attention_mask[:, None, None].bool()
        memory = self.encode(input_ids, seen)
        ids = torch.full((len(input_ids), 1), START, device=input_ids.device)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(min(max_new_tokens, self.positions.num_embeddings - 1)):
            following = self.decode(ids, memory, seen)[:, -1].argmax(-1).masked_fill(done, END)
            ids = torch.cat([ids, following[:, None]], 1)
            done |= following == END
            if done.all():
                break
        return ids


def translator() -> Translator:
    """The model that ``translator.pt`` belongs to."""
    return Translator(vocab_size=206)
