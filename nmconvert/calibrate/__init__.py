"""Pruning with calibration data: layer after layer on what the pruned layers before it give, against the dense outputs.

==================  ===================================================================================================
``driver``          the sequence for an ``nn.Module``: :func:`~nmconvert.calibrate.driver.prune_model`
``onnx_driver``     the same for a bare ONNX file: ``onnx_module`` makes it a module, ``onnx_ops`` computes its operators
``stage``           what ``nmconvert prune --calib`` calls
``replay``          runs a model piece by piece and keeps the activations between the pieces
``store``           where these activations are: in memory up to a limit, on disk beyond it
``unfold``          convolutions as matrix products, in the order of the matrix views
``moments``         layer inputs → the statistics that the solvers need
``correct``         norms, biases and reconstruction, each kept only if held-out samples say that it helps
``answers``         what a whole model is judged by
``distance``        how far two answers are apart where they are probabilities
``images``          few images made many
``atoms, axes``     which channels may change places, and the proof; ``axes_torch`` and ``axes_onnx`` for each kind of graph
``permute``         which order keeps more; ``onnx_permute`` puts a bare graph into it
``subject``         what budgets and sensitivities are measured on: a module, or a bare graph
``budget``          which pattern for which layer, under a budget of accuracy, size or speed
``resume``          where an interrupted run goes on
==================  ===================================================================================================
"""
