"""Calls the script of `popo completion` in a real bash."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from popo_lightning.__main__ import SUBCOMMANDS, other_parsers
from popo_lightning.cli.completion import SHELLS, script

pytest.importorskip("shtab")
ASK = """source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_popo popo "${COMP_WORDS[$COMP_CWORD]}" "${COMP_WORDS[$COMP_CWORD-1]}" 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "popo.bash"
    file.write_text(script("bash", other_parsers()))
    return file


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ((""), set(SUBCOMMANDS)),
        (("fit", "--data.gro"), {"--data.group_size"}),
        (("fit", "--config", "method/popo_g"), {"method/popo_gated"}),
        (("compare", "--config", "compare/qu"), {"compare/quick"}),
        (("fit", "--data.composer", "Prioritized"), {"PrioritizedGroupReplay"}),
        (("fit", "--run.resume", ""), {"true", "false"}),
        (("export", "--push"), {"--push_to_hub"}),
        (("fit", "--no_such"), set()),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value),  # the same in each process
)
def test_what_bash_offers(words: str | tuple[str, ...], offered: set[str], made: Path) -> None:
    given = ["popo", *([words] if isinstance(words, str) else words)]
    done = subprocess.run(
        ["bash", "-c", ASK, "ask", made, *given], capture_output=True, text=True, timeout=60, cwd=made.parent
    )
    assert set(done.stdout.split()) == offered


@pytest.mark.parametrize("shell", SHELLS[1:])
def test_other_shells_have_the_settings(shell: str) -> None:
    assert "--data.group_size" in (text := script(shell, other_parsers())) and "completion" in text
