"""The configuration that fedtune composes; `pkg://fedtune.conf` puts it on the search path of another application."""
