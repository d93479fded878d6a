"""The command line: a file for every command, and `commands.py`, which has them all."""

from moeopt.cli.commands import app, main

__all__ = ["app", "main"]
