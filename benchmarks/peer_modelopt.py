"""NVIDIA ModelOpt's 2:4 pruning of a CIFAR ResNet; peers.py runs this in an environment that has nvidia-modelopt.

    python peer_modelopt.py MODE MODEL_FILE NETWORK CHECKPOINT SAMPLES.npy OUT.pt

MODE is sparse_magnitude or sparsegpt; its settings are ModelOpt's own.
"""

import runpy
import sys

import modelopt.torch.sparsity as mts
import numpy as np
import torch


def main() -> None:
    """Prune, and write a plain state dict."""
    mode, model_file, network, checkpoint, samples, out = sys.argv[1:]
    model = runpy.run_path(model_file)[network]()
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    batches = torch.from_numpy(np.load(samples)).split(64)

    def show(net: torch.nn.Module) -> None:
        for batch in batches:
            net(batch)

    pruned = mts.export(mts.sparsify(model.eval(), mode, config={"forward_loop": show, "verbose": True}))
    torch.save(pruned.state_dict(), out)


if __name__ == "__main__":
    main()
