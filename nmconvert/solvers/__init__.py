"""One layer's weights, pruned against the second moments of its inputs: pure functions on matrices, float64 inside.

``quadratic`` states the problem and re-solves the kept weights; ``sparsegpt`` is the published algorithm, exact groups and the
choice among all of them; ``alps`` is ADMM and exact swaps.
"""
