"""``popo`` and ``python -m popo_lightning``."""

from __future__ import annotations

import os
import sys

from popo_lightning import __version__

COMPARE = "compare"
TOP_LEVEL_HELP = ("-h", "--help")
VERSION = "--version"


def main() -> None:
    """Runs the command line. What must be set before torch and vLLM are imported is set here."""
    if sys.argv[1:] == [VERSION]:  # answered without the seconds that torch takes to import
        print(f"popo {__version__}")
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.argv[1:2] == [COMPARE]:
        from popo_lightning.compare.command import main as compare

        sys.exit(compare(sys.argv[2:]))
    from popo_lightning.cli import run

    try:
        run()
    finally:
        if len(sys.argv) > 1 and sys.argv[1] in TOP_LEVEL_HELP:  # the other subcommands are the Trainer's
            print(f"    {COMPARE:<20}Run methods x seeds on a task, one or several at a\n{'':24}time, and report.")
            print(f"\n  {VERSION:<22}Print the version and exit.")


if __name__ == "__main__":
    main()
