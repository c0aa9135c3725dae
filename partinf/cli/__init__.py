"""The `partinf` command: one file per sub-command, loaded only when that one is asked for."""

from partinf.cli.dispatch import main

__all__ = ["main"]
