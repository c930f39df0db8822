"""Before a model loads, unusable numbers, names and slots give one sentence with setting, value and remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.tiny_models import method, popo

from popo_lightning.cli.expected_kinds import misfit
from popo_lightning.core.errors import SettingError
from popo_lightning.core.number_settings import check_numbers
from popo_lightning.policy import PolicyModule
from popo_lightning.toys.countdown import CountdownSteps
from popo_lightning.toys.countdown_policy import CountdownWarmStart

LARGEST = 9223372036854775807
REFUSED = {  # command line, and sentence
    "--data.temperature .nan": "data.temperature is nan; use a finite number",
    "--data.temperature .inf": "data.temperature is inf; use a finite number",
    "--data.temperature 1e-300": "data.temperature is 1e-300; it must be in [0.001, 1000], such as 1.0",
    "--data.grading_timeout 0": "data.grading_timeout is 0.0; it must be a finite number above 0, such as 5.0 seconds",
    "--model.max_grad_norm .inf": "model.max_grad_norm is inf; use a finite number",
    "--model.behave_weight.cap .inf": "model.behave_weight.cap is inf; use a finite number",
    "--model.behave_weight.cap 1e308": "behave_weight.cap is 1e+308, which float32 cannot hold; use at most 3.4e38",
    "--model.max_grad_norm 1e39": "model.max_grad_norm is 1e+39, which float32 cannot hold",
    "--model.optimizer.eps 1e300": "model.optimizer.eps is 1e+300, which float32 cannot hold",
    "--data.overlong.buffer_tokens 2 --data.overlong.most 1e100": "data.overlong.most is 1e+100, which float32 cannot",
    "--model.optimizer.lr .inf": "model.optimizer.lr is inf; use a finite number",
    "--model.optimizer.lr .nan": "model.optimizer.lr is nan; use a finite number",
    "--model.optimizer.lr null": "model.optimizer.lr is null, where a value belongs; leave it out, which is 0.001",
    "--model.optimizer.betas [.nan,0.9]": "model.optimizer.betas[0] is nan; use a finite number",
    "--model.optimizer.eps .nan": "model.optimizer.eps is nan; use a finite number",
    "--model.optimizer.weight_decay .inf": "model.optimizer.weight_decay is inf; use a finite number",
    "--model.optimizer.weight_decay -1": "model.optimizer cannot be made: Invalid weight_decay value: -1.0; correct",
    "--model.optimizer torch.optim.SGD --model.optimizer.momentum .nan": "model.optimizer.momentum is nan",
    "--model.lr_scheduler torch.optim.lr_scheduler.LinearLR --model.lr_scheduler.start_factor .nan": "factor is nan",
    "--model.lr_scheduler torch.optim.lr_scheduler.CosineAnnealingLR --model.lr_scheduler.T_max 0": "is "
    "CosineAnnealingLR, which fails at its first step",
    "--trainer.callbacks EarlyStopping --trainer.callbacks.monitor x --trainer.callbacks.min_delta .nan": "nan",
    "--data.group_size 100000000000000000000": "data.group_size is 100000000000000000000; use at most 1048576: each",
    "--data.group_size 1000000000": "data.group_size is 1000000000; use at most 1048576: each response",
    "--data.group_size 1000000 --data.problems_per_iteration 1000": "together 1000000000 responses in an iteration",
    "--data.num_graders 100000": "data.num_graders is 100000; use at most 1024: each is a process",
    "--data.ppo_epochs 99999999": "data.ppo_epochs is 99999999; use at most 65536",
    "--data.max_prompt_tokens 0": "data.max_prompt_tokens is 0; use at least 1",
    "--model.micro_batch_tokens 99999999999999999999": f"is 99999999999999999999; use at most {LARGEST}",
    "--trainer.max_epochs 99999999999999999999": f"is 99999999999999999999; use at most {LARGEST}",
    "--trainer.devices 99999": "trainer.devices is 99999, processes on a CPU; use at most",
    "--trainer.log_every_n_steps -1": "trainer.log_every_n_steps is -1; use at least 1",
    "--trainer.max_time {hours:-3}": "trainer.max_time is",
    "--trainer.max_time 00:00:00:00": "trainer.max_time is '00:00:00:00', no time at all; write DD:HH:MM:SS",
    "--trainer.precision bf17": "trainer.precision is 'bf17'; use 32-true or bf16-mixed",
    "--trainer.profiler fast": "trainer's settings do not go together",
    "--checkpoint.save_top_k 3": "checkpoint.save_top_k is 3, but checkpoint.monitor is null",
    "--checkpoint.save_top_k -2": "checkpoint.save_top_k is -2; use a number of checkpoints, or -1 for all",
    "--checkpoint.save_top_k 3 --checkpoint.monitor train/los": "checkpoint.monitor is 'train/los', which is never",
    "--checkpoint.mode up": "checkpoint.mode is 'up'; use min or max",
    "--checkpoint.every_n_epochs -1": "checkpoint.every_n_epochs is -1; use at least 1, or null for none",
    "--checkpoint.every_n_train_steps -1": "checkpoint.every_n_train_steps is -1; use at least 1",
    "--checkpoint.filename {epoch": "checkpoint.filename is '{epoch', which no name can be made of",
    "--checkpoint.filename {epoch:zz}": "checkpoint.filename is '{epoch:zz}', which no name can be made of",
    "--checkpoint.filename a/b": "checkpoint.filename is 'a/b', which is no name of a file",
    "--checkpoint.dirpath ''": "checkpoint.dirpath is empty, which names no place",
    "--data.stop ''": "data.stop is ''; use a list of texts, such as [one, two] or null",
    "--data.stop [a,'']": "data.stop is ['a', ''], and every text has the empty one",
    "--run.task " + "a" * 300: "run.task is 'aaaaaaaaaaaaaaaaaaaa…', 300 bytes, and names a folder; use at most 100",
    "--proximal null": "proximal is null, but every run has one; leave it out",
    "--parameter_hook null": "parameter_hook is null, but every run has one; leave it out",
    "--data.task.largest_number 1000000000000": "data.task.largest_number is 1000000000000, of which 2 numbers",
    "--model.warm_start.heads 3": "model.warm_start.hidden_size is 64 and model.warm_start.heads 3",
    "--model.warm_start.batch_size 0": "model.warm_start.batch_size is 0; use a number from 1 to 65536",
    "--model.warm_start.learning_rate -1": "model.warm_start.learning_rate is -1.0; use a number above 0",
    "--model.warm_start.hidden_size 1000000000": "model.warm_start.hidden_size is 1000000000; use a number from 1 to",
    "--seed_everything foo": "seed_everything is foo; use a whole number from 0 to 4294967295",
    "--seed_everything ''": "seed_everything is ''; use a whole number from 0 to 4294967295",
    "--data.image_pixels [5]": "data.image_pixels has another number of parts; use a list of 2",
}
PARSED = {  # what the parser itself refuses
    "--data.group_size 1e3": "data.group_size is 1000.0; use a whole number, in digits alone: 1000",
    "--data.group_size 1e20": "data.group_size is 1e+20; use a whole number of at most 1048576",
    "--data.weight_sync_interval 1e20": f"data.weight_sync_interval is 1e+20; use a whole number of at most {LARGEST}",
    "--data.group_size ''": "data.group_size is ''; use a whole number",
    "--data.group_size null": "data.group_size is null; use a whole number",
    "--data.temperature 0,7": "data.temperature is '0,7'; use a number, with a point for the comma: 0.7",
    "--data.temperature 70%": "data.temperature is '70%'; use a number, a share as part of 1: 0.7",
    "--data.temperature nan": "data.temperature is nan; use a number",
    "--data.async_level 2": "data.async_level is 2; use 0 or 1",
    "--run.resume maybe": "run.resume is maybe; use true or false",
    "--model.optimizer.lr -1e-5": "--model.optimizer.lr is followed by -1e-5, which looks like an option; write it as "
    "--model.optimizer.lr=-1e-5",
    "--data.group_size": "--data.group_size has no value; write one after it, as --data.group_size VALUE",
    "-data.group_size 4": "-data.group_size is no option of popo fit; write it with two dashes, as --data.group_size",
    "data.group_size=4": "data.group_size is no option of popo fit; write it with two dashes, as --data.group_size",
    "--model.behave_weight.cap two": "popo: model.behave_weight.cap is two; use a number or null",
    "--data.composer popo_lightning.objectives.weights.TruncatedIS": "is "
    "popo_lightning.objectives.weights.TruncatedIS, which "
    "is no Composer; name a class derived from it",
    "--data.composer popo_lightning.replay.composer.Composer": "which only describes such classes",
    "--data.composer popo_lightning/replay/composer.py": "which is no import path; write one as package.module.Class",
    "--model.optimizer popo_lightning.objectives.weights.TruncatedIS": "TruncatedIS, which is no Optimizer; name a "
    "class derived",
    "--model.optimizer null": "model.optimizer is null, but a class belongs there",
    "--model.lr_scheduler torch.optim.lr_scheduler.StepLR": "StepLR needs step_size; set model.lr_scheduler.step_size",
    "--config {data:": "--config is written inline and is no YAML",
}


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No model is loaded, whatever is refused."""
    monkeypatch.setattr(PolicyModule, "configure_model", lambda self: pytest.fail("a model loads"))
    yield


@pytest.mark.parametrize("line", [*REFUSED, *PARSED])
def test_one_sentence(line: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [arg if arg != "''" else "" for arg in line.split()]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        popo("fit", "--config", config, *method("popo"), "--run.root", tmp_path, *args)
    assert stopped.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    print(sentence)
    assert sentence.startswith("popo: ") and len(sentence) < 400
    assert {**REFUSED, **PARSED}[line] in sentence


def test_numbers_that_are_fine() -> None:
    check_numbers({"data": {"group_size": 8, "problems_per_iteration": 32}, "seed_everything": 2**32 - 1})
    check_numbers({"trainer": {"callbacks": [{"class_path": "mine.Callback", "init_args": {"limit": float("inf")}}]}})
    with pytest.raises(SettingError, match=r"trainer.callbacks\[0\].limit is inf"):
        check_numbers({"trainer": {"callbacks": [{"class_path": "torch.X", "init_args": {"limit": float("inf")}}]}})
    check_numbers({"trainer": {"callbacks": [{"class_path": "mine.Callback", "init_args": {"limit": 1e308}}]}})
    check_numbers({"model": {"behave_weight": {"cap": 3.4e38}, "advantage": {"shift": -3.4e38}}})
    with pytest.raises(SettingError, match=r"model.advantage.shift is -3.5e.38, which float32 cannot hold"):
        check_numbers({"model": {"advantage": {"shift": -3.5e38}}})
    with pytest.raises(SettingError, match="is a number of about 5000 digits; use at most 9223372036854775807"):
        check_numbers({"data": {"weight_sync_interval": 10**4999}})


@pytest.mark.parametrize(
    "make", [lambda: CountdownSteps(5, 100), lambda: CountdownWarmStart(layers=0), lambda: CountdownWarmStart(heads=3)]
)
def test_sizes(make: Callable[[], object]) -> None:
    with pytest.raises(SettingError, match=r"(data.task|model.warm_start)\.\w+ is \d+"):
        make()


def test_a_message_about_something_else() -> None:
    assert misfit("data", "Expected the unexpected") is None
    assert misfit("", "Expected int. Got value: x") is None
    assert misfit("data.x", "Expected SomeOddThing. Got value: x") is None
