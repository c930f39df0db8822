"""A rule's state is named by its class and saved as it is. A forgotten part is noticed."""

from __future__ import annotations

import io
import logging
from collections import OrderedDict, defaultdict, deque
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
import pytest
import torch
from helpers.groups import group, ids, response
from helpers.tiny_models import fit

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Group, Response
from popo_lightning.core.kept_state import KeepsState, Watch, names
from popo_lightning.core.minibatch import Minibatch
from popo_lightning.core.problems import Problem
from popo_lightning.replay.buffer import GroupReplayBuffer
from popo_lightning.replay.composer import Composer, Iteration


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Many(KeepsState):
    state = ("count", "words", "queue", "by_problem", "counts", "order", "buffer")

    def __init__(self, length: int = 3) -> None:
        self.count: Any = 0
        self.words: set[str] = set()
        self.queue: deque[Group] = deque(maxlen=length)
        self.by_problem: dict[str, tuple[Problem, float]] = {}
        self.counts: defaultdict[int, list[float]] = defaultdict(list)
        self.order: OrderedDict[str, int] = OrderedDict()
        self.buffer = GroupReplayBuffer(5, None)

    def learn(self, id: int) -> None:
        found = group(id, id)
        self.count += 1
        self.words.add(f"w{id}")
        self.queue.append(found)
        self.by_problem[found.problem.id] = found.problem, 0.5
        self.counts[id].append(0.25)
        self.order[f"o{id}"] = id
        self.buffer.insert([found], 5)


def test_every_kind_of_container_comes_back_as_it_was() -> None:
    first, again, shorter, twin = Many(), Many(), Many(2), Many()
    for id in range(4):
        first.learn(id)
    saved = first.state_dict()
    first.learn(4)  # later changes must not change the saved state
    first.counts[0].append(7.0)
    for read in (again, shorter):
        read.load_state_dict(through_a_file(saved))
    assert (again.count, again.words) == (4, {"w0", "w1", "w2", "w3"})
    assert ids(again.queue) == [1, 2, 3] and again.queue.maxlen == 3
    assert ids(shorter.queue) == [2, 3] and shorter.queue.maxlen == 2
    assert again.by_problem["problem 2"] == (group(2).problem, 0.5)
    again.counts[9].append(1.0)
    assert dict(again.counts) == {0: [0.25], 1: [0.25], 2: [0.25], 3: [0.25], 9: [1.0]}
    again.order.move_to_end("o0")
    assert list(again.order) == ["o1", "o2", "o3", "o0"]
    assert ids(again.buffer.newest(9, 9)) == [3, 2, 1, 0]

    twin.load_state_dict(saved)
    twin.learn(0)
    assert saved["counts"][0] == [0.25] and "w4" not in saved["words"], "a rule changes nothing that it was given"


def test_a_checkpoint_holds_no_class_but_these() -> None:
    class Own:
        pass

    holder = Many()
    for value in ({"a": [Random(1)]}, Own(), [deque([1])], {1: {2: Own()}}, [torch.Generator()]):
        holder.count = value
        with pytest.raises(SettingError, match=r"Many\.count holds an object of class (Random|Own|deque|Generator)"):
            holder.state_dict()
    for value in ([torch.zeros(2), None, b"x", "y", 1.5, True], {1: (2, {3})}, Minibatch([group(0)], 0, 0)):
        holder.count = value
        through_a_file(holder.state_dict())


def test_fields_of_a_checkpoint_are_looked_at_as_those_of_a_new_one() -> None:
    good = group(3)
    read = through_a_file(good)
    assert read.problem == good.problem and read.responses[0].parts == good.responses[0].parts
    bad = response()
    object.__setattr__(bad, "behave_logp", torch.zeros(7))
    with pytest.raises(Exception, match="one behavior log-prob per token"):
        through_a_file(bad)
    for kept in (good, response(), good.problem):
        object.__setattr__(kept, "strange", 1)
        with pytest.raises(Exception, match="strange"):
            through_a_file(kept)
    assert {Problem, Response, Group, Minibatch} <= set(torch.serialization.get_safe_globals())


def test_a_class_adds_names_to_those_of_its_bases() -> None:
    class More(Many):
        state = ("extra",)
        transient = ("shown",)
        extra = 1

    assert names(More(), "state") == [*Many.state, "extra"] and names(More(), "transient") == ["shown"]
    more, read = More(), More()
    more.extra = 5
    read.load_state_dict(more.state_dict())
    assert read.extra == 5
    with pytest.raises(SettingError, match=r"nothing of More\.extra"):
        More().load_state_dict(Many().state_dict())


def test_names_that_are_none_are_refused() -> None:
    class Text(Many):
        state = "buffer"  # type: ignore[assignment]

    class Absent(Many):
        state = ("bufer",)

    with pytest.raises(SettingError, match=r"Text\.state is 'buffer'; give a tuple"):
        Watch("data.composer", Text())
    with pytest.raises(SettingError, match=r"data\.composer Absent has no 'bufer'"):
        Watch("data.composer", Absent())


class Forgetful(Composer):
    """A user's rule that has a buffer and a list, but names neither."""

    transient = ("shown",)

    def __init__(self) -> None:
        self.buffer = GroupReplayBuffer()
        self.seen: list[int] = []
        self.bounds = {"b": 1, "a": (2, None)}
        self.reward = lambda group: 0
        self.shown = 0

    def compose(self, iteration: Iteration) -> list[Group]:
        fresh = iteration.rollout()
        self.buffer.insert(fresh, len(fresh))
        self.seen.append(iteration.version)
        self.late = iteration.version
        self.shown += 1
        return fresh


class Remembers(Forgetful):
    state = ("buffer", "seen", "late")
    late = 0


class ByHand(Forgetful):
    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen)}


class Saves(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"{trainer.current_epoch}.ckpt")


@pytest.mark.parametrize(("rule", "found"), [(Forgetful, ["buffer", "seen", "late"]), (Remembers, []), (ByHand, [])])
def test_what_a_users_rule_forgets_is_said_once(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, rule: type[Composer], found: list[str]
) -> None:
    with caplog.at_level(logging.WARNING):
        fit(policy, tmp_path, composer=rule(), iterations=3, callbacks=[Saves()])
    said = [record.getMessage() for record in caplog.records if "`transient`" in record.getMessage()]
    assert [each.split("'")[1] for each in said] == found
    assert all(each.startswith("data.composer Forgetful changes") and "name it in `state`" in each for each in said)
