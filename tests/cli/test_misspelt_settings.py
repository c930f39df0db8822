"""A misspelt setting, class or config file gives one sentence with the nearest correct name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.parsers import ParsesAll
from helpers.places import REPOSITORY
from helpers.tiny_models import method, popo

from popo_lightning.cli.compare.command import parsed
from popo_lightning.cli.config_files import check_comparison_files, check_config_files
from popo_lightning.cli.parser import command_of
from popo_lightning.cli.parser_sentences import GROUPS, Command, explained
from popo_lightning.cli.run_parts import making
from popo_lightning.cli.shipped_configs import named_configs
from popo_lightning.core.did_you_mean import OF_OTHERS, class_paths, nearest, nearest_class, nearest_setting
from popo_lightning.core.errors import SettingError

TASK = str(REPOSITORY / "configs" / "task" / "countdown_tiny.yaml")
FIT = ["fit", "--config", TASK, *method("popo")]


@pytest.fixture(scope="module")
def parser() -> ParsesAll:
    """Returns the parser of popo, which raises its sentences."""
    return ParsesAll(FIT)


OPTIONS = {  # command line, and sentence
    "--model.lerning_rate 1": "is no option of popo fit; did you mean --model.optimizer.init_args.lr?",
    "--data.grop_size 4": "did you mean --data.group_size?",
    "--data.grop_size=4": "--data.grop_size is no option of popo fit; did you mean --data.group_size?",
    "--group_size 4": "did you mean --data.group_size?",
    "--modle.path x": "did you mean --model.path?",
    "--data.group 4": "--data.group is no option of popo fit; did you mean --data.group_size?",
    "--data.group_siz 4": "did you mean --data.group_size?",
    "--trainer.max_e 1": "did you mean --trainer.max_epochs?",
    "--run.res true": "did you mean --run.resume?",
    "--run.dir x": "--run.dir is no option of popo fit; did you mean --run.folder?",
    "--checkpoint.dir x": "did you mean --checkpoint.dirpath?",
    "--num_generations 8": "did you mean --data.group_size?",
    "--actor_rollout_ref.actor.clip_ratio_low 0.1": "did you mean --model.trust_region.clip_low?",
    "--seed 3": "did you mean --seed_everything?",
    "--model.gradient_sync.every 3": (
        "model.gradient_sync.every is no setting, since model.gradient_sync has none inside it; give "
        "model.gradient_sync text"
    ),
    "--data.effective_key.a 3": "data.effective_key.a is no setting, since",
    "--pla": "did you mean --plan?",
    "--bogus": "--bogus is no option of popo fit; popo fit --help lists them all",
    "extra": "'extra' is no option of popo fit",
    "--model.optimizer.init_args.lrr 1": "model.optimizer: AdamW has no setting 'lrr'; did you mean lr?",
    "--model.behave_wieght.cap 4": "is no option of popo fit; did you mean --model.behave_weight.cap?",
    "--modle.behave_weight.cap 4": "is no option of popo fit; did you mean --model.behave_weight.cap?",
    "--data.compser.buffer.capacity 4": "is no option of popo fit; did you mean --data.composer.buffer.capacity?",
    "--data.composer.bufer.capacity 4": "data.composer: PrioritizedGroupReplay has no setting 'bufer'; did you mean "
    "buffer?",
    "--weather.of.today 4": "is no option of popo fit; popo fit --help lists them all",
    "--data.composer.bufer 1": "PrioritizedGroupReplay has no setting 'bufer'; did you mean buffer?",
    "--data.composer.buffer.capasity 1": "data.composer.buffer: GroupReplayBuffer has no setting 'capasity'",
    "--data.task.numbrs 1": "data.task: CountdownSteps has no setting 'numbrs'; did you mean numbers?",
    "--model.critic popo_lightning.model.critic.Critic --model.critic.lrr 1": "model.critic: Critic has no setting "
    "'lrr'",
    "--model.behave_weigt NoCorrection": "did you mean --model.behave_weight?",
    "--data.composer popo_lightning.replay.composer.PrioritisedGroupReplay": "did you mean "
    "popo_lightning.methods.popo.PrioritizedGroupReplay?",
    "--data.composer PrioritizedGroupReply": "data.composer: there is no class 'PrioritizedGroupReply'; did you mean "
    "popo_lightning.methods.popo.PrioritizedGroupReplay?",
    "--data.composer popo_lightning.replay.composer.PrioritizedGroupReplay": "did you mean "
    "popo_lightning.methods.popo.PrioritizedGroupReplay?",
    "--data.task popo_lightnin.tasks.dataset.DatasetTask": "did you mean popo_lightning.tasks.dataset.DatasetTask?",
    "--model.behave_weight TruncatdIS": "model.behave_weight: there is no class 'TruncatdIS'; "
    "did you mean popo_lightning.objectives.weights.TruncatedIS?",
    "--model.trust_region popo_lightning.objectives.PPOCli": "mean popo_lightning.objectives.trust_regions.PPOClip?",
    "--model.warm_start CountdownWarmStrt": "did you mean popo_lightning.toys.countdown_policy.CountdownWarmStart?",
    "--trainer.callbacks EarlyStoping": "trainer.callbacks: there is no class 'EarlyStoping'; did you mean "
    "lightning.pytorch.callbacks.EarlyStopping?",
    "--trainer.logger CSVLoger": "did you mean lightning.pytorch.loggers.CSVLogger?",
    "--model.optimizer AdamWW": "did you mean torch.optim.AdamW?",
    "--model.lr_scheduler CosineAnnealing": "did you mean torch.optim.lr_scheduler.CosineAnnealingLR?",
    "--trainer.callbacks EarlyStopping --trainer.callbacks.monitr x": "EarlyStopping has no setting 'monitr'; "
    "did you mean monitor?",
    "--trainer.callbacks EarlyStopping": "EarlyStopping needs monitor; set trainer.callbacks.monitor",
    "--model.lora true": "model.lora has 'true' where settings belong; write them as {r: 16}",
    "--model.lora foo/bar": "model.lora has 'foo/bar' where settings belong",
    "--model.critic 3": "model.critic has '3' where settings belong",
    "--data.overlong yes": "data.overlong has 'yes' where settings belong; write them as {buffer_tokens: 100}",
    "--data.limits.length foo": "data.limits has 'foo' where settings belong; write them as NAME: {bound: 300}",
    "--model.critic popo_lightning.model.critic.Critc": "did you mean popo_lightning.model.critic.Critic?",
    "--data.task nosuch.module.Task": "nosuch.module.Task is in no module that is here; start popo in the folder of "
    "nosuch.py, or name that folder in PYTHONPATH, or install the package",
    "--data.task toys.countdown.CountdownSteps": "did you mean popo_lightning.toys.countdown.CountdownSteps?",
    "--data.task ''": "data.task is '', but a class belongs there",
    "--data.composer.buffer 3": "data.composer.buffer is '3', but a class belongs there",
    "--data.engine null": "data.engine is null, but a RolloutEngine belongs there",
    "--checkpoint null": "checkpoint is null, but it is a group of settings; to write no checkpoints, set "
    "checkpoint.save_top_k to 0",
    "--evaluation null": "evaluation is null, but it is a group of settings",
    "--data x": "data is 'x', but it is a group of settings; give them one by one, as --data.NAME VALUE",
    "--evaluation.max_new_tokens many": "evaluation.max_new_tokens is many; use a whole number or null",
    "--evaluation.benchmarks.a.sampls 3": "evaluation.benchmarks: Expected a mapping",
    "--data.group_size many": "data.group_size is many; use a whole number",
    "--model.optimizer.lr fast": "model.optimizer.lr is fast; use a number",
    "--model.optimizer.betas 3": "model.optimizer.betas is 3; use a list",
}


@pytest.mark.parametrize("line", OPTIONS)
def test_an_option(line: str, parser: ParsesAll) -> None:
    args = ["" if arg == "''" else arg for arg in line.split()]
    with pytest.raises(SettingError) as refused:
        parser.parse_arguments(parser.parser, [*FIT, *args])
    sentence = str(refused.value)
    print(sentence)
    assert OPTIONS[line] in sentence
    assert "\n" not in sentence and len(sentence) < 300
    assert "Union" not in sentence and "Namespace" not in sentence and "<class" not in sentence


def test_a_file_of_this_folder(parser: ParsesAll, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_region.py").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=r"did you mean my_region\.Quadratic\?"):
        parser.parse_arguments(parser.parser, [*FIT, "--model.trust_region", "my_regoin.Quadratic"])


def test_an_option_of_another_subcommand(parser: ParsesAll) -> None:
    for args in (["--plan"], ["--card_gib", "80"]):
        with pytest.raises(SettingError, match=rf"{args[0]} is an option of popo fit, not of popo validate"):
            parser.parse_arguments(parser.parser, ["validate", "--config", TASK, *args])


def test_packages_that_are_missing(parser: ParsesAll, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only packages this project knows get the install command. A misspelt name may be an unrelated package."""
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = explained("model.optimizer: Type x: No module named 'torchao'. Got value: torchao.optim._AdamW", Command(""))
    assert said == (
        "model.optimizer: torchao.optim._AdamW needs the package torchao, which is not installed: "
        "pip install -c constraints/gpu.txt torchao"
    )
    assert "pip install" not in explained("data.task: No module named 'nosuch'", Command(""))


def test_the_card_preset_without_torchao(parser: ParsesAll) -> None:
    if _there("torchao"):
        pytest.skip("torchao is installed")
    with pytest.raises(SettingError, match="needs the package torchao, which is not installed: pip install -c"):
        card = str(REPOSITORY / "configs" / "card" / "24gb_1p5b.yaml")
        parser.parse_arguments(parser.parser, [*FIT, "--config", card])


def _there(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def test_what_constructors_refuse() -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    with (
        pytest.raises(SettingError, match=r"ModelCheckpoint refuses its settings: .*mode"),
        making(SimpleNamespace(), {}),
    ):
        ModelCheckpoint(monitor="x", mode="up")
    union = (
        "Does not validate against any of the Union subtypes\nSubtypes: [<class 'a.Logger'>, <class 'NoneType'>]\n"
        "Errors:\n  - {}\n  - Expected a <class 'NoneType'>\nGiven value type: <class 'x.Namespace'>\n"
        "Given value: Namespace(class_path='b.WandbLogger', init_args=Namespace())"
    )
    for error, said in {
        "Problem with given class_path 'b.WandbLogger':\n      Requirement 'wandb>=0.12.10' not met. HINT: Try": (
            "WandbLogger needs the package wandb, which is not installed: pip install 'wandb>=0.12.10'"
        ),
        "`mode` can be min, max, got up": "WandbLogger refuses `mode` can be min, max, got up",
    }.items():
        with pytest.raises(SettingError) as refused, making(SimpleNamespace(), {}):
            raise ValueError(union.format(error))
        assert str(refused.value) == said
    with pytest.raises(ValueError, match="a fault of its own") as kept, making(SimpleNamespace(), {}):
        raise ValueError("a fault of its own")
    assert not isinstance(kept.value, SettingError)


FILES = {  # content, and sentence
    "data:\n\tgroup_size: 4\n": ["line 2", "'group_size: 4'", "indent with spaces, not with a tab"],
    "data:\n  group_size: 4\n minibatches: 2\n": ["line 3", "indent those of a group alike"],
    "data: {group_size: 4\n": ["close the bracket of line 1"],
    "data:\n  group_size: [4\n": ["close the bracket of line 2"],
    "data group_size 4\n": ["line 1", "with a space after the colon"],
    "- data\n": ["line 1 is no setting"],
    "": ["which is empty"],
    "# only words\n": ["which is empty"],
    "checkpoint: null\n": ["checkpoint is null", "checkpoint.save_top_k to 0"],
    "trainer:\n": ["trainer is null"],
    "data:\n  group_size: 4\n  ppo_epochs: 1\n  group_size: 8\n": ["line 4 sets data.group_size although line 2 has"],
    "data: {ppo_epochs: 1}\nrun: {task: x}\ndata: {group_size: 8}\n": ["line 3 sets data although line 1 has"],
}


@pytest.mark.parametrize("content", FILES)
def test_a_config_file(content: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(content)
    with pytest.raises(SettingError) as refused:
        check_config_files(["--config", str(file)], GROUPS)
    sentence = str(refused.value)
    print(sentence)
    assert [word for word in (f"--config is '{file}'", *FILES[content]) if word not in sentence] == []
    assert "\n" not in sentence


def test_a_config_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("data: {ppo_epochs: 1}\n")
    (tmp_path / "noise.yaml").write_bytes(b"\xff\xfe\x00")
    monkeypatch.chdir(tmp_path)
    for given, said in {
        "configs/mien.yaml": "which does not exist; did you mean configs/mine.yaml?",
        "mine": "did you mean configs/mine.yaml?",
        "configs/method/pop.yaml": f"did you mean {REPOSITORY / 'configs' / 'method' / 'popo.yaml'}?",
        "popo": "did you mean method/popo?",
        "quite_another.yaml": "name a YAML file, or one that popo configs lists",
        "configs": "which is a folder",
        "noise.yaml": "write one in UTF-8",
    }.items():
        with pytest.raises(SettingError) as refused:
            check_config_files([f"--config={given}"])
        assert said in str(refused.value)
    check_config_files(["-c", "configs/mine.yaml", "--config", "data: {ppo_epochs: 1}"])
    named = named_configs(["--config=a", "-c", "b", "--config", "{x: 1}", "--config"])
    assert [name for _, _, name in named] == ["a", "b"]


def test_two_methods_in_a_row(tmp_path: Path) -> None:
    """Settings of the first method that the second does not name would remain."""
    with pytest.raises(SettingError, match=r"--config names the methods '.*popo.yaml' and '.*grpo.yaml'"):
        check_config_files(["--config", TASK, *method("popo"), *method("grpo")])
    mine = tmp_path / "mine.yaml"
    mine.write_text("run: {method: mine}\ndata: {ppo_epochs: 2}\n")
    check_config_files(["--config", TASK, *method("popo"), *method("popo"), "--config", str(mine)])


def test_two_methods_are_refused_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        popo(*FIT, *method("grpo"), "--print_config")
    assert stopped.value.code == 2
    assert "names the methods" in capsys.readouterr().err


def test_a_file_before_the_subcommand(tmp_path: Path) -> None:
    for before in (["-c", TASK], [f"--config={TASK}"]):
        with pytest.raises(SettingError, match=r"comes before fit; write it after: popo fit --config"):
            check_config_files([*before, "fit", *method("popo")])
    check_config_files(["fit", f"--config={TASK}", *method("popo")])
    everything = tmp_path / "all.yaml"
    everything.write_text("fit: {data: {ppo_epochs: 1}}\n")
    check_config_files(["-c", str(everything), "fit"])
    check_config_files([])


def test_commands_in_sentences_can_be_pasted(tmp_path: Path) -> None:
    """Of files with a space in their names."""
    task, quick = tmp_path / "a task.yaml", tmp_path / "a comparison.yaml"
    task.write_text(Path(TASK).read_text())
    quick.write_text((REPOSITORY / "configs" / "compare" / "quick.yaml").read_text())
    for said, args in {
        f"popo fit --config '{task}'": ["--config", str(task), "fit"],
        f"popo compare --config '{quick}'": ["fit", "--config", str(quick)],
    }.items():
        with pytest.raises(SettingError) as refused:
            check_config_files(args)
        assert str(refused.value).endswith(said)
    with pytest.raises(SettingError) as refused:
        check_comparison_files(["--config", str(task)])
    assert str(refused.value).endswith(f"popo fit --config '{task}'")


def test_a_comparison_and_a_run_are_not_mixed_up() -> None:
    for name, groups in {"method/popo": "run, data, model", "task/countdown_tiny": ""}.items():
        file = str(REPOSITORY / "configs" / f"{name}.yaml")
        with pytest.raises(SettingError, match=r"popo compare needs a comparison: .*such as compare/quick") as refused:
            parsed(["--config", file])
        assert file in str(refused.value) and str(refused.value).endswith(f"popo fit --config {file}")
        assert groups in str(refused.value)
    quick = str(REPOSITORY / "configs" / "compare" / "quick.yaml")
    with pytest.raises(SettingError, match=rf"which is a comparison; run it by popo compare --config {quick}"):
        check_config_files(["fit", "--config", quick])
    assert parsed(["--config", quick]).methods


def test_a_setting_that_is_missing(parser: ParsesAll, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        SettingError, match=r"popo fit needs data.task; name a file that has it by --config, "
    ) as refused:
        parser.parse_arguments(parser.parser, ["fit"])
    assert str(refused.value).endswith("such as task/countdown_tiny (see popo configs)")
    with pytest.raises(SystemExit):
        parsed([])
    assert "such as compare/quick (see popo configs)" in capsys.readouterr().err


def test_every_config_of_the_project_is_read() -> None:
    for file in (REPOSITORY / "configs").rglob("*.yaml"):
        check_config_files(["--config", str(file)])


def test_the_nearest_name() -> None:
    known = ["data.group_size", "data.num_graders", "model.path", "run.resume"]
    assert nearest("data.group_sise", known) == "data.group_size"
    assert nearest("model.group_size", known) == "data.group_size"
    assert nearest("data.weather", known) is None
    assert nearest("x", []) is None
    assert nearest_class("TruncatdIS") == "popo_lightning.objectives.weights.TruncatedIS"
    assert nearest_class("Umbrella") is None
    assert class_paths()["TruncatedIS"] == "popo_lightning.objectives.weights.TruncatedIS"
    assert "PopoCLI" not in class_paths() and "ParsesAll" not in class_paths()


def test_the_settings_of_other_libraries_are_none_of_ours_and_mean_some(parser: ParsesAll) -> None:
    known = command_of(parser.parser).options["popo fit"]
    for theirs, ours in OF_OTHERS.items():
        assert nearest_setting(theirs, known) == nearest_setting(f"trainer_args.{theirs}", known) == ours
        assert theirs not in known
