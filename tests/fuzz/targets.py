"""All parsers that the tests feed broken input, by name. `python -m tests.fuzz.targets` prints them.

Add a `Target` for each new parser of external input to `wire_targets.py` or `file_targets.py`.
"""

from . import file_targets, wire_targets

TARGETS = {target.name: target for target in (*wire_targets.TARGETS, *file_targets.TARGETS)}


def render_table() -> str:
    """Return a Markdown table with the name of each parser and the errors that it may raise."""
    lines = ["| input | errors it may raise |", "| --- | --- |"]
    for name, target in TARGETS.items():
        lines.append(f"| {name} | {', '.join(error.__name__ for error in target.errors) or 'none'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(render_table())
