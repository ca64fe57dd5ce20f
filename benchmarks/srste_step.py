"""What SR-STE adds to a training step of a network of ResNet-50's shape, against the dense step.

    python -m benchmarks.srste_step                      # 2:4 and 1:4, CPU, one thread
    python -m benchmarks.srste_step --device cuda --batch 128

Three models take turns, step by step: dense; nmconvert's SR-STE; and the published form (NM-sparsity's SparseConv), which
sorts the groups anew in every forward pass and adds λ(1-mask)w in backward. Printed are median times of a step and the
median of the ratios within one turn. On a CPU processor time is measured, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.resnet50 import resnet50
from nmconvert.srste import sparsify


class SortedSTE(torch.autograd.Function):
    """The published form: argsort in forward, the decay in backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, n: int, m: int, decay: float) -> Tensor:
        """Groups along the input channels, as NM-sparsity's SparseConv."""
        ctx.save_for_backward(weight)
        permuted = weight.detach().abs().permute(0, 2, 3, 1).reshape(-1, m)
        index = torch.argsort(permuted, dim=1)[:, : m - n]
        mask = torch.ones_like(permuted).scatter_(1, index, 0)
        size = weight.shape
        mask = mask.reshape(size[0], size[2], size[3], size[1]).permute(0, 3, 1, 2)
        ctx.mask, ctx.decay = mask, decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient, plus λ(1-mask)w."""
        (weight,) = ctx.saved_tensors
        return grad + ctx.decay * (1 - ctx.mask) * weight, None, None, None


class SortedConv(nn.Conv2d):
    """A convolution under `SortedSTE`."""

    pattern = (2, 4)

    def forward(self, x: Tensor) -> Tensor:
        """As a convolution."""
        weight: Tensor = SortedSTE.apply(self.weight, *self.pattern, 2e-4)  # type: ignore[no-untyped-call]
        return F.conv2d(x, weight, None, self.stride, self.padding)


def sorted_form(model: nn.Module, n: int, m: int) -> nn.Module:
    """``model`` with every convolution of more than four input channels in the published form."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.in_channels > 4:
            module.__class__ = SortedConv
            assert isinstance(module, SortedConv)
            module.pattern = (n, m)
    return model


def stepper(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, precision: str) -> Callable[[], None]:
    """A function that takes one SGD step."""

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()

    return step


def measure(step: Callable[[], None], device: str) -> float:
    """Seconds: processor time on a CPU, wall time on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    """Run and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patterns", default="2:4,1:4")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    x = torch.randn(arguments.batch, 3, 224, 224, device=arguments.device).to(memory_format=layout)
    y = torch.randint(1000, (arguments.batch,), device=arguments.device)
    for pattern in arguments.patterns.split(","):
        n, m = map(int, pattern.split(":"))
        steps = {}
        for name in ("dense", "nmconvert", "argsort"):
            torch.manual_seed(0)
            model: nn.Module = resnet50().to(arguments.device)
            model = model.to(memory_format=layout)  # type: ignore[call-overload]
            if name == "argsort":
                model = sorted_form(model, n, m)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
            if name == "nmconvert":
                sparsify(model, pattern).attach(optimizer)
            steps[name] = stepper(model, optimizer, x, y, arguments.precision)
        turns = []
        for _ in range(arguments.turns + 1):
            turns.append({name: measure(step, arguments.device) for name, step in steps.items()})
        turns = turns[1:]  # the first warms up
        print(
            json.dumps(
                {
                    "pattern": pattern,
                    "batch": arguments.batch,
                    "device": arguments.device,
                    "precision": arguments.precision,
                    "channels_last": arguments.channels_last,
                    **{f"{name} s": round(statistics.median(t[name] for t in turns), 4) for name in steps},
                    "nmconvert / dense": round(statistics.median(t["nmconvert"] / t["dense"] for t in turns), 4),
                    "argsort / dense": round(statistics.median(t["argsort"] / t["dense"] for t in turns), 4),
                }
            )
        )


if __name__ == "__main__":
    main()
