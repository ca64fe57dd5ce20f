"""Stock onnxruntime with the native N:M kernels.

``session(path)`` is all it takes in Python; ``options.register_custom_ops_library(str(library()))`` does the same in anyone's
program, in any language. Without the kernels the same files run on the functions that they carry, at dense speed.
"""

from nmconvert.runtime.locate import Kernels, kernels, library
from nmconvert.runtime.session import session

__all__ = ["Kernels", "kernels", "library", "session"]
