"""Local training: DP-SGD steps over LoRA and head.  The only layer that knows Opacus."""
