"""``python -m nmconvert``, and what ``torchrun -m nmconvert`` runs."""

from nmconvert.cli import main

main()
