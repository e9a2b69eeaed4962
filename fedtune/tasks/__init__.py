"""The tasks: one module each, and the list of all tasks (`registry`)."""
