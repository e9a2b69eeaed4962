"""The model layer: a frozen base, adapters by PEFT, and the adapter file that sites exchange."""
