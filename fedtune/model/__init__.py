"""Frozen base models, PEFT adapters on them, and the adapter format that sites exchange."""
