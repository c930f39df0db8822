"""A parser that is built once and serves many commands."""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI

from popo_lightning.cli.compare.checking import ParsedOnly


class ParsesAll(ParsedOnly):
    """Has the parsers of all subcommands, whichever is called, so that its `parser` can parse any command."""

    _add_subcommands = LightningCLI._add_subcommands
