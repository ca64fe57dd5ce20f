"""Stock onnxruntime with the native N:M kernels.

``session(path)`` is all it takes in Python; ``options.register_custom_ops_library(str(library()))`` does the same in anyone's
program, in any language, but for the choice between sparse and dense, which a file from ``tuned(path)`` brings along. Without
the kernels the same files run on the functions that they carry, at dense speed.
"""

from nmconvert.runtime.locate import Kernels, kernels, library
from nmconvert.runtime.session import session, tuned

__all__ = ["Kernels", "kernels", "library", "session", "tuned"]
