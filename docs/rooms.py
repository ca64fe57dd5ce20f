"""Which module stands where: in this order the README lists them, and `tests/test_architecture.py` holds imports to it."""

from __future__ import annotations

# From the top of the house to its cellar (DESIGN.md, "Rooms"). A module imports from lower rows, and from its own row.
ROOMS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("report", "page", "plot"),
    ("verify", "inspect", "bench", "pace"),
    ("export",),
    ("train",),
    ("evaluate",),
    ("tasks",),
    ("prune",),
    ("srste",),
    ("calibrate",),
    ("solvers",),
    ("masks", "magnitude"),
    ("runtime", "onnx_model"),
    ("model", "hugging_face", "norms"),
    ("checkpoint",),
    ("onnx_graph",),
    ("manifest",),
    ("plan", "rules", "targets"),
    ("tensor", "packing", "detect", "arrays"),
    ("matrix",),
    ("pattern", "inputs", "dist", "extras", "imports", "signature"),
    ("errors",),
)
