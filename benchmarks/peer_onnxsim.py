"""onnxsim's N:M pruning of an ONNX file; peers.py runs this in an environment that has onnxsim and onnxruntime.

    python peer_onnxsim.py METHOD N:M DENSE.onnx SAMPLES.npy OUT.onnx [INITIALISER …]

METHOD is magnitude, wanda or sparsegpt. onnxsim prunes every convolution and matrix product and has no way to leave one out;
the named weights are put back afterwards as they were. (Magnitude writes new initialisers and leaves the dense ones in the
file, unused.)
"""

import sys

import numpy as np
import onnx
import onnxsim


def main() -> None:
    """Prune, put back, and write."""
    method, pattern, source, samples, out, *kept = sys.argv[1:]
    n, m = map(int, pattern.split(":"))
    dense = onnx.load(source)
    batches = [{dense.graph.input[0].name: batch} for batch in np.split(np.load(samples), 8)]
    if method == "magnitude":
        pruned = onnxsim.apply_magnitude_pruning(dense, n=n, m=m)
    else:
        prune = {"wanda": onnxsim.apply_wanda_pruning, "sparsegpt": onnxsim.apply_sparsegpt_pruning}[method]
        pruned = prune(dense, calibration_data=batches, n=n, m=m)
    put_back(pruned, onnx.load(source), kept)
    onnx.save(pruned, out)


def put_back(pruned: onnx.ModelProto, dense: onnx.ModelProto, names: list[str]) -> None:
    """Let the nodes that read the weights ``names`` in ``dense`` read them again; nodes are known by their outputs."""
    readers = {node.output[0]: node.input[1] for node in dense.graph.node if len(node.input) > 1 and node.input[1] in names}
    for node in pruned.graph.node:
        if node.output[0] in readers:
            node.input[1] = readers[node.output[0]]
    others = [tensor for tensor in pruned.graph.initializer if tensor.name not in names]
    del pruned.graph.initializer[:]
    pruned.graph.initializer.extend([*others, *(t for t in dense.graph.initializer if t.name in names)])


if __name__ == "__main__":
    main()
