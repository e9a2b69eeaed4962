"""Local training: DP-SGD steps on the LoRA adapter and the task head. The only layer that imports Opacus."""
