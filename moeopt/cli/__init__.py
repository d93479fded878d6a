"""The command line: a file for every command, all of them in `commands.py`. May import every room."""

from moeopt.cli.commands import app, main

__all__ = ["app", "main"]
