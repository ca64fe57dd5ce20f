"""Small models, each with something on the way of its channels that a permutation has to respect; ``x`` is their input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """A stem, residual blocks with norms, a depthwise convolution, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu6(self.bn1(self.conv1(x)))
        y = F.hardswish(self.bn2(self.depth(y)))
        return self.head((x + self.conv2(y)).mean((2, 3)))


class Padded(nn.Module):
    """Shortcuts that pad channels, as in the CIFAR ResNets."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.last = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.last((F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + self.conv2(self.conv1(x).relu())).relu())


class Attention(nn.Module):
    """Embedding, attention over heads, an MLP, norms over the residual stream, and a head."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(11, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.out = nn.Linear(width, 6)

    def split(self, x):
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, tokens):
        x = self.embed(tokens)
        h = self.norm1(x)
        a = F.scaled_dot_product_attention(self.split(self.q(h)), self.split(self.k(h)), self.split(self.v(h)))
        x = x + self.o(a.transpose(1, 2).reshape(*x.shape))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.out(x.mean(1))


class SharedHeads(nn.Module):
    """Attention whose keys and values are repeated for two query heads each, written out; SwiGLU from one projection."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 16)
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.gate, self.down = nn.Linear(16, 48), nn.Linear(24, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 4, 4).permute(0, 2, 1, 3)
        k, v = self.kv(x).view(b, t, 2, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = (s[:, :, None].expand(b, 2, 2, t, 4).reshape(b, 4, t, 4) for s in (k, v))
        a = ((q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v
        x = x + self.o(a.permute(0, 2, 1, 3).reshape(b, t, 16))
        left, right = self.gate(x).chunk(2, -1)
        return self.out(x + self.down(F.silu(left) * right))


class Encoder(nn.Module):
    """torch's own transformer layer, and a class token before the sequence."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
        self.out = nn.Linear(16, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), 1, 16), x], 1) + self.place
        return self.out(self.layer(x)[:, 0])


class Halves(nn.Module):
    """Two branches of half the channels, concatenated."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.after, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        a, b = self.stem(x).relu().chunk(2, 1)
        return self.last(self.after(torch.cat([self.left(a), self.right(b)], 1)).relu())


class ShuffleUnit(nn.Module):
    """Half of the channels goes past two convolutions with a depthwise one between them; then both are shuffled."""

    def __init__(self, width):
        super().__init__()
        self.first, self.last = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.depth, self.norm = nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.BatchNorm2d(width)

    def forward(self, x):
        a, b = x.chunk(2, 1)
        b = self.last(self.norm(self.depth(self.first(b).relu()))).relu()
        x = torch.cat([a, b], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Shuffled(nn.Module):
    """Units of ShuffleNet."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * width, 3, padding=1)
        self.units = nn.Sequential(*(ShuffleUnit(width) for _ in range(3)))
        self.last = nn.Conv2d(2 * width, 4, 1)

    def forward(self, x):
        return self.last(self.units(self.stem(x).relu()))


class Pyramid(nn.Module):
    """Three chains from one value, concatenated with one another and with what has been up- and downsampled."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.chain = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(3))
        self.fuse, self.up = nn.Conv2d(24, 8, 1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.last = nn.Conv2d(32, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.down(x).relu()
        one, two = self.chain[0](y), self.chain[1](self.chain[0](y))
        z = self.fuse(torch.cat([one, two, self.chain[2](two)], 1)).relu()
        levels = [x, F.interpolate(z, scale_factor=2.0), self.up(y), F.max_pool2d(x, 3, 1, 1)]
        return self.last(torch.cat(levels, 1))


class Grouped(nn.Module):
    """Convolutions in groups, a depthwise one with two outputs a channel, a transposed one in groups; squeeze, excite."""

    def __init__(self):
        super().__init__()
        self.stem, self.groups = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 24, 3, padding=1, groups=2)
        self.mix, self.twice = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.norm = nn.GroupNorm(4, 16)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 3, padding=1, groups=2), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.norm(self.twice(self.mix(self.groups(self.stem(x)).relu()).relu()))
        x = x * self.excite(self.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return self.last(self.up(x).relu())


class Flattened(nn.Module):
    """A classifier over channels and pixels together, in both orders."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.first, self.second = nn.Linear(32, 8), nn.Linear(32, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(self.stem(x).relu()).relu()
        return self.last((self.first(x.flatten(1)) + self.second(x.permute(0, 2, 3, 1).flatten(1))).tanh())


class Windows(nn.Module):
    """Attention within windows of a map, channels last, with rotary positions."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 1), nn.LayerNorm(16)
        self.qkv, self.o, self.last = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("angle", torch.randn(16, 4))

    def turned(self, x):
        left, right = x.chunk(2, -1)
        return x * torch.cos(self.angle).repeat(1, 2) + torch.cat([-right, left], -1) * torch.sin(self.angle).repeat(1, 2)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        b = x.shape[0]
        w = self.norm(x).view(b, 2, 4, 2, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(b * 4, 16, 16)
        q, k, v = self.qkv(w).reshape(b * 4, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
        a = ((self.turned(q) @ self.turned(k).transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).reshape(b * 4, 16, 16)
        y = self.o(a).view(b, 2, 2, 4, 4, 16).permute(0, 1, 3, 2, 4, 5).reshape(b, 8, 8, 16)
        return self.last(x + y)


class Causal(nn.Module):
    """Attention among tokens that are the channels of a convolution: a mask says where each of them looks."""

    def __init__(self):
        super().__init__()
        self.tokens, self.read, self.last = nn.Conv1d(3, 16, 1), nn.Linear(16, 8), nn.Linear(8, 4)

    def attended(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    def forward(self, x):
        x = self.attended(self.tokens(x.flatten(2))[:, None])[:, 0]
        return self.last(self.read(x.transpose(1, 2)).tanh())


class Masked(Causal):
    """The mask is a tensor of the model."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.randn(16, 16))

    def attended(self, x):
        return F.scaled_dot_product_attention(x, x, x, self.mask)


class Computed(Causal):
    """The mask is computed anew."""

    def attended(self, x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(16, 16, dtype=torch.bool).tril())


class Relative(Causal):
    """The mask is looked up by the distance of two tokens, as in Swin."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(31, 1)
        self.register_buffer("distance", torch.arange(16)[:, None] - torch.arange(16) + 15)

    def attended(self, x):
        return F.scaled_dot_product_attention(x, x, x, self.table(self.distance)[None, ..., 0])


class Rotary(Causal):
    """No mask, but queries and keys are turned by their tokens' places."""

    def __init__(self):
        super().__init__()
        angle = torch.arange(16)[:, None] * torch.linspace(0.1, 1, 32).repeat(2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def attended(self, x):
        left, right = x.chunk(2, -1)
        turned = x * self.cos + torch.cat([-right, left], -1) * self.sin
        return F.scaled_dot_product_attention(turned, turned, x)


MODELS = (
    Residual, Padded, Attention, SharedHeads, Encoder, Halves, Shuffled, Pyramid, Grouped, Flattened, Windows, Causal, Masked,
    Computed, Relative, Rotary,
)  # fmt: skip


def built(kind: type[nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model with random weights and norms, in evaluation mode."""
    torch.manual_seed(seed)
    model = kind().to(dtype).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return model


def example(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> Tensor:
    """An input."""
    generator = torch.Generator().manual_seed(0)
    if issubclass(kind, Attention):
        return torch.randint(0, 11, (2, 5), generator=generator)
    shape = (2, 5, 6) if issubclass(kind, SharedHeads) else (2, 3, 8, 8)
    return torch.randn(*shape, generator=generator, dtype=dtype)


class Routed(nn.Module):
    """Two experts, each of the tokens [B, 16] that a router gives it, behind a first layer."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.out = nn.Linear(16, 32), nn.Linear(32, 2), nn.Linear(32, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(2))

    def forward(self, x):
        h = self.first(x).relu()
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            tokens = (self.gate(h).argmax(1) == number).nonzero().flatten()
            y = y.index_add(0, tokens, expert(h[tokens]))
        return self.out(y)
