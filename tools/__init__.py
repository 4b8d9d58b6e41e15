"""Command-line tools; each is a script of its own."""
