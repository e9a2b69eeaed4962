"""fedtune: federated, differentially private fine-tuning with LoRA adapters."""

import os

# Before torch first computes: MKL otherwise chooses kernels, and parts sums among threads, by how many rows a product
# has, and so rounds an example by its neighbours.  Whether it does is tried on each machine (training/preflight.py).
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__version__ = "0.1.0"
