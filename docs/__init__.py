"""The documentation; its text is in Markdown beside this file."""
