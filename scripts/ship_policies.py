"""Builds the tiny policies of the embedded tasks by their recipes and puts them into the package.

    python scripts/ship_policies.py [--only countdown]

Weights built on another kind of processor differ by rounding and are equally good (`pytest -m slow tests/toys`). Each
policy takes one to two minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from popo_lightning.core import warm_start
from popo_lightning.toys.countdown_policy import CountdownWarmStart
from popo_lightning.toys.geometry_policy import GeometryWarmStart

RECIPES = {"countdown": CountdownWarmStart, "geometry": GeometryWarmStart}


def ship(name: str) -> Path:
    """Builds a policy and replaces its old folder.

    Args:
        name: Name in RECIPES.
    """
    recipe = RECIPES[name]()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["POPO_CACHE"] = cache
        built = Path(cache) / recipe.address
        recipe.build_at(built)
        for old in warm_start.SHIPPED.glob(f"{recipe.name}-*"):
            shutil.rmtree(old)
        return Path(shutil.copytree(built, warm_start.SHIPPED / recipe.address))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=RECIPES)
    asked = parser.parse_args()
    for name in [asked.only] if asked.only else RECIPES:
        print(ship(name))
