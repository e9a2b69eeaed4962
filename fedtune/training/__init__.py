"""Local training: DP-SGD steps on LoRA adapter and task head.  The only layer that uses Opacus."""
