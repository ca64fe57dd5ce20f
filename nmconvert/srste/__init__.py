"""SR-STE: train the weights of a model so that they end as N:M (Zhou et al., "Learning N:M fine-grained structured sparse
neural networks from scratch", ICLR 2021; "the paper" below).

The forward pass sees ``mask ⊙ w``, where the mask keeps the largest weights of each group and follows the dense weight once
per optimiser step; the gradient passes the mask unchanged (straight through); and pruned weights decay, by λ·(1-mask)·w.
Three lines put it into any training loop::

    sparse = nmconvert.sparsify(model, "2:4", axis="channel")
    sparse.attach(optimizer)
    ...                              # train as before
    sparse.finalize()

The mask is a parametrization (`torch.nn.utils.parametrize`), so the parameter is the very same object before and after,
and whatever knows modules (deepcopy, state_dict, compile, autocast, DDP, FSDP2) knows this. The decay is applied by hooks
of the optimiser, outside autograd: once per step, however many processes, accumulated batches or loss scales there are.
With SGD it is added to the gradient, as in the paper. With any other optimiser it is decoupled, as AdamW's weight decay:
inside the gradient, the second moment would divide it away again (and be spoilt by it: STEP, ICML 2023). While it trains,
`nmconvert.srste.plain_state_dict` gives the weights as they would be once finalized, for checkpoints that others read.
"""

from __future__ import annotations

from nmconvert.srste.masked import WeightMask, plain_state_dict
from nmconvert.srste.sparse import (
    ANNEALS,
    DECAY,
    DECOUPLED_DECAY,
    METHODS,
    Anneal,
    Method,
    Sparse,
    Statistics,
    sparsify,
    sparsify_plan,
    weights_of,
)

__all__ = [
    "ANNEALS",
    "DECAY",
    "DECOUPLED_DECAY",
    "METHODS",
    "Anneal",
    "Method",
    "Sparse",
    "Statistics",
    "WeightMask",
    "plain_state_dict",
    "sparsify",
    "sparsify_plan",
    "weights_of",
]
