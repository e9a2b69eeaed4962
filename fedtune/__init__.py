"""fedtune: federated, differentially private fine-tuning with LoRA adapters."""

__version__ = "0.1.0"
