"""Entry point of `python -m fedtune`."""

from fedtune.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
