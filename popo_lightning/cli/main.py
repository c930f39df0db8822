"""The ``popo`` command: runs LightningCLI over policy, rollouts and callbacks, with no logic of its own."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from popo_lightning.cli.class_faults import show_traceback
from popo_lightning.cli.parser import refuse
from popo_lightning.cli.popo_cli import PopoCLI
from popo_lightning.cli.quiet_libraries import quieten
from popo_lightning.cli.shipped_configs import with_config_names, with_config_paths
from popo_lightning.core.config_options import configs_first
from popo_lightning.core.errors import (
    EngineGapError,
    NotFiniteError,
    NothingSavedError,
    SettingError,
    disk_refusal,
    own_refusal,
    reason,
)
from popo_lightning.core.rank_refusals import print_refusal
from popo_lightning.core.ranks import lost_rank
from popo_lightning.runs.folder import is_first_rank
from popo_lightning.runs.resume import RunFinished
from popo_lightning.runs.stopping import Stopped, stopped_in_words


def run(args: Sequence[str]) -> PopoCLI:
    """Runs one command; for a user's mistake it prints one sentence and exits with code 2."""
    quieten()
    args = configs_first(with_config_paths(args))
    claims = ExitStack()
    try:
        return PopoCLI(args, claims)
    except (SettingError, ValueError) as error:
        # jsonargparse wraps what the constructor of an optional class raises
        refusal = own_refusal(error)
        if refusal is None:
            raise
        show_traceback(refusal)
        refuse(str(refusal))
    except RunFinished as finished:
        if is_first_rank():
            print(f"popo: {finished}", file=sys.stderr)
        sys.exit(0)
    except (EngineGapError, NotFiniteError, NothingSavedError) as error:
        print_refusal("; ".join(map(str, (error, *getattr(error, "__notes__", ())))))
        sys.exit(1)
    except OSError as error:
        if (said := disk_refusal(error)) is None:
            raise
        print_refusal("; ".join((said, *getattr(error, "__notes__", ()))))
        sys.exit(1)
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        print(
            "popo: this rank stops because another rank is gone, whose own output says why; checkpoints are complete, "
            f"and --run.resume true resumes from the newest, if there is one ({reason(error)})",
            file=sys.stderr,
        )
        sys.exit(1)
    except Stopped as stop:
        if stop.speaks:
            where = stopped_in_words(stop, with_config_names(args))
            for sentence in (*getattr(stop, "__notes__", ()), where):
                print(f"popo: {sentence}", file=sys.stderr)
        # a rank that another one started exits with 0: its starter gives the exit code, and would be killed otherwise
        sys.exit(0 if stop.launched else stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except SystemExit as ended:
        if isinstance(ended.__context__, KeyboardInterrupt):  # how Lightning passes it on
            sys.exit(128 + signal.SIGINT)
        raise
    finally:
        claims.close()
