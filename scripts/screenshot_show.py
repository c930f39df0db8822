"""Takes pictures of the page that popo show makes of runs, with a headless Chromium.

    python scripts/screenshot_show.py runs/countdown_tiny/popo-seed1 runs/countdown_tiny/grpo-seed1

It writes docs/images/show.png, with the runs and their learning curves, and show_groups.png, the browser of groups.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

from browser import CHROMIUM, Page
from PIL import Image

from popo_lightning.cli.show.command import made
from popo_lightning.cli.show.runs import Limits
from popo_lightning.core.errors import SettingError

WIDTH = 1320
GROUPS = 1000  # height of the browser of groups in pixels
COLORS = 128  # of the palette; a page has few
TOP_OF = "document.getElementById('{}').getBoundingClientRect().top + scrollY"
NEWEST_FIRST = """(() => {
    const order = document.querySelector('#filters select[aria-label=order]');
    order.value = 'down';
    order.dispatchEvent(new Event('change'));
    document.querySelector('.bar').style.position = 'static';
})()"""


def save(picture: bytes, path: Path) -> None:
    """Writes a PNG with a palette, which is a third as large."""
    with Image.open(io.BytesIO(picture)) as full:
        full.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path)


def take(page: Page, folder: Path) -> None:
    """Takes the pictures of a loaded page."""
    page.ask(NEWEST_FIRST)
    save(page.picture(0, 0, WIDTH, page.ask(TOP_OF.format("replay")) - 14), folder / "show.png")
    save(page.picture(0, page.ask(TOP_OF.format("groups")) + 12, WIDTH, GROUPS), folder / "show_groups.png")
    if page.complaints:
        raise RuntimeError(f"the page complains: {page.complaints}")


def main() -> int:
    """Makes the page and takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder of the pictures")
    wanted = parser.parse_args()
    if not CHROMIUM:
        print("there is no Chromium on this machine; install Debian's package chromium", file=sys.stderr)
        return 2
    wanted.output.mkdir(parents=True, exist_ok=True)
    try:
        text, _ = made(wanted.runs, Limits(samples=5000, evaluated=10**9, images=200))
    except SettingError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, Page() as page:
        file = Path(folder) / "show.html"
        file.write_text(text, encoding="ascii")
        take(page.open(file, WIDTH), wanted.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
