"""Reports packages that a setting needs and that are not installed, with the command that installs them."""

from __future__ import annotations

from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent.parent / "constraints"


def needs(package: str, versions: str) -> str:
    """Says that a package is missing. The command is given for known names only: a misspelt one may be a stranger's."""
    known = [file.name for file in sorted(CONSTRAINTS.glob("*.txt")) if f"\n{package.lower()}==" in file.read_text()]
    if not versions and not known:
        return (
            f"is in no module that is here; install the package that has {package}, or name the folder of {package}.py "
            "in PYTHONPATH"
        )
    where = f" -c constraints/{known[0]}" if known else ""
    return f"needs the package {package}, which is not installed: pip install{where} " + (
        f"'{package}{versions}'" if versions else package
    )
