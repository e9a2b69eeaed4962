"""The model layer: a frozen base, LoRA adapters by PEFT, and the adapter that travels."""
