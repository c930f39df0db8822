"""The subcommand `popo export`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

INTERRUPTED = 130


def main(args: Sequence[str]) -> int:
    """Runs the subcommand.

    Returns:
        Exit code: 0, 1 if the folder is complete but its upload failed, or 130 if it was interrupted.
    """
    from popo_lightning.cli.export.options import export_parser

    asked = export_parser().parse_args(args)  # answers --help before torch is imported
    from popo_lightning.cli.export.exported_folder import export
    from popo_lightning.cli.export.hub import NotTakenError, check_hub, push
    from popo_lightning.cli.parser import refuse
    from popo_lightning.cli.quiet_libraries import quieten
    from popo_lightning.core.errors import SettingError

    quieten()
    target = Path(asked.folder).expanduser()
    command = shlex.join(["popo", "export", *args])
    saved = None
    try:
        if asked.push_to_hub is not None:
            check_hub(asked.push_to_hub)
        saved = export(asked.source, target, command, asked.dtype, asked.best, asked.base, adapter=asked.adapter)
        print(f"exported {saved.checkpoint} (after iteration {saved.iterations}) to {target}", file=sys.stderr)
        if asked.push_to_hub is not None:
            print(f"uploaded to {push(target, asked.push_to_hub)}", file=sys.stderr)
    except SettingError as error:
        refuse(str(error))
    except NotTakenError as error:
        print(f"popo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        left = "is whole, but not uploaded" if saved is not None else "was not written"
        print(f"popo: stopped; {target} {left}", file=sys.stderr)
        return INTERRUPTED
    return 0
