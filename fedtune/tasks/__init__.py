"""The tasks: one file each, and their list (`registry`)."""
