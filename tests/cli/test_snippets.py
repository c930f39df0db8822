"""popo accepts every command and every YAML of the README and the docs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from helpers.parsers import ParsesAll
from helpers.places import REPOSITORY
from helpers.snippets import WITHOUT_CONFIG, Checker, blocks, commands, expanded

from popo_lightning.cli.compare.command import parsed
from popo_lightning.cli.config_files import check_config_files
from popo_lightning.cli.estimate.options import estimate_options
from popo_lightning.cli.export.options import export_parser, sample_parser
from popo_lightning.cli.show.command import parser as show_parser
from popo_lightning.core.errors import SettingError

FOUND = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/README.md", "benchmarks/gpu/README.md")
PAGES = sorted(path for pattern in FOUND for path in REPOSITORY.glob(pattern))


@pytest.fixture(scope="module")
def popo() -> Callable[[Sequence[str], bool], dict[str, Any]]:
    """Returns a function that reads commands. It makes one parser, and reads the same words once."""
    base = [f"--config={REPOSITORY}/configs/{name}.yaml" for name in ("task/countdown_tiny", "method/popo")]
    parser = ParsesAll(["fit", *base]).parser
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def read(arguments: list[str], built: bool) -> dict[str, Any]:
        if arguments[0] == "compare":
            parsed(arguments[1:]).check()
            return {}
        if arguments[0] == "show":
            show_parser().parse_args(arguments[1:])
            return {}
        if arguments[0] in WITHOUT_CONFIG:
            readers = {"export": export_parser().parse_args, "estimate": estimate_options}
            readers.get(arguments[0], sample_parser().parse_args)(arguments[1:])
            return {}
        check_config_files(arguments)
        config = parser.parse_args(arguments)
        if built:
            parser.instantiate_classes(config)
        return vars(config[arguments[0]])

    def once(arguments: Sequence[str], built: bool = False) -> dict[str, Any]:
        key = (str(Path.cwd()), *arguments)
        if built or key not in known:
            said = StringIO()
            try:
                with redirect_stderr(said), redirect_stdout(StringIO()):
                    known[key] = read(list(arguments), built)
            except SystemExit as stopped:
                if stopped.code:
                    raise SettingError(said.getvalue()) from stopped
                known[key] = {}  # --help, --version and --print_config print and exit
        return known[key]

    return once


@pytest.fixture
def checker(
    popo: Callable[[Sequence[str], bool], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Checker:
    monkeypatch.setattr(sys, "path", [*sys.path])

    def enter(folder: Path) -> None:
        if not folder.is_dir():
            raise SettingError(f"{folder} is no folder")
        monkeypatch.chdir(folder)
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # popo also finds classes in its working directory

    return Checker(popo, enter, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_page(page: Path, checker: Checker) -> None:
    assert checker.page(page.read_text()) == []


def test_pages_have_commands_and_settings() -> None:
    """Otherwise the tests above would have nothing to check."""
    languages = [block.language for page in PAGES for block in blocks(page.read_text())]
    assert languages.count("bash") > 60 and languages.count("yaml") > 40


TASK = "popo fit --config configs/task/countdown_tiny.yaml"
WRONG = {  # what a page says, and words of the complaint
    f"```bash\n{TASK} --data.grupo_size 4\n```": "1: .*grupo_size",
    f"```bash\n{TASK} \\\n    --data.group_size many\n```": "1: .*group_size",
    f"text\n\n```bash\n{TASK} --config configs/method/nope.yaml\n```": "3: .*nope.yaml",
    "```bash\nSEED=1 popo fit ... --plan --card_gob 4\n```": "1: .*card_gob",
    "```bash\nsrun popo fit ... --nope 1 || true\n```": "1: .*nope",
    "```bash\ntorchrun --nnodes 2 -m popo_lightning fit ... --nope 1\n```": "1: .*nope",
    "Try `popo fit ...\n--nope 1`.": "1: .*nope",
    "Try `popo fit --nope 1` or ``popo fit --other 1``.": "1: .*nope",
    "```bash\n.venv/bin/popo fit ... --nope 1\n```": "1: .*nope",
    "`popo fit ... --config configs/method/grpo.yaml`": "1: .*names the methods",
    "```bash\npopo\n```": "1: popo needs a subcommand",
    "```bash\npopo learn --config configs/task/countdown_tiny.yaml\n```": "1: .*learn",
    "```bash\npopo compare --config configs/compare/quick.yaml --seeds [1] --nope 2\n```": "1: .*nope",
    "```bash\npopo show runs/a --nope 2\n```": "1: .*nope",
    "```bash\npopo export RUN FOLDER --dtyp float32\n```": "1: .*did you mean --dtype",
    "Try `popo sample RUN --n 2`.": "1: .*needs PROMPT",
    "```bash\nbash scripts/nope.sh\n```": "1: scripts/nope.sh is not there",
    "```bash\nscripts/nope.sh MODEL | tee log\n```": "1: scripts/nope.sh is not there",
    "```bash\npython scripts/bench_buffer.py --nope 3\n```": "1: .*bench_buffer.py has no --nope",
    "```bash\npip install -e '.[cpu,nope]'\n```": "1: .*no extra nope",
    "```bash\npip install -c constraints/nope.txt torchao\n```": "1: .*nope.txt is not there",
    "```bash\nrm -rf build\n```": "1: rm is no command",
    "```bash\ncd nowhere\n```": "1: .*nowhere is no folder",
    "```yaml\ndata: {grupo_size: 4}\n```": "1: .*grupo_size",
    "```yaml\ndata: {group_size: 4}\nmodle: {path: x}\n```": "1: .*modle",
    "```yaml\ndata: {composer: {class_path: popo_lightning.replay.composer.Nope}}\n```": "1: .*Nope",
    "```yaml\ndata: {group_size: 1}\n```": "1: .*data.group_size is 1",  # refused by the constructor
    "```yaml\na: [1\n```": "1: .*",
    "```yaml\nseeds: [1]\nnope: 2\n```": "1: .*nope",
    "```python\ndef f(:\n```": "1: .*syntax",
    "<!-- not run -->\n```bash\nnope\n```": "2: say why it is not run",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_found(text: str, checker: Checker) -> None:
    complaints = checker.page(text)
    assert len(complaints) == 1 and re.match(WRONG[text], complaints[0]), complaints


RIGHT = [
    f"<!-- not run: as it is -->\n\n```bash\nnope\n```\n\n```bash\n{TASK} --config configs/method/NAME.yaml\n```",
    "```bash\nfor seed in 1 2; do popo fit ... --seed_everything $seed > log 2>&1; done\n```",
    "```bash\npopo validate --config runs/countdown_tiny/popo-seed1/config.yaml\n```",
    "```bash\n.venv/bin/popo fit --help\npopo --version\n```",
    f"`{TASK} --config configs/method/{{popo,grpo}}.yaml --seed_everything 2 ...`",
    "`popo export RUN FOLDER --dtype bfloat16`, `popo export --help`\n```bash\npopo sample RUN - < file\n```",
    "`popo fit --plan` and `popo compare --config configs/compare/quick.yaml --seeds [1] --at_once N`, and `popo nope`",
    "```yaml\n- a list\n```\n```yaml\nsomething: else\n```\n```text\nnope --nope\n```",
]


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_right_passes(text: str, checker: Checker) -> None:
    assert checker.page(text) == []


def test_commands_as_bash_reads_them() -> None:
    text = "A=1 popo fit \\\n  --x '[a b]'  # c\ncd d && e/f.sh {g,h} >> log; for i in 1; do popo $i | j; done\n"
    assert list(commands(text)) == [
        ["popo", "fit", "--x", "[a b]"],
        ["cd", "d"],
        ["e/f.sh", "g"],
        ["popo", "1"],
        ["j"],
        ["cd", "d"],
        ["e/f.sh", "h"],
        ["popo", "1"],
        ["j"],
    ]
    assert expanded("{a,b}/{c,d} {x: 1}") == ["a/c {x: 1}", "a/d {x: 1}", "b/c {x: 1}", "b/d {x: 1}"]
