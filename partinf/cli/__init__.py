"""The `partinf` command: one file per sub-command, loaded only when it is requested."""

from partinf.cli.dispatch import main

__all__ = ["main"]
