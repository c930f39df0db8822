"""``popo`` and ``python -m popo_lightning``."""

from __future__ import annotations

import os


def main() -> None:
    """Runs the command line. What must be set before torch and vLLM are imported is set here."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from popo_lightning.cli import run

    run()


if __name__ == "__main__":
    main()
