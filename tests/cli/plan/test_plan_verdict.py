"""What fits a card. The settings that a refusal names make the run fit."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from helpers.plan import GivenActivations, model

from popo_lightning.cli.plan.architecture import Architecture
from popo_lightning.cli.plan.memory import GIB, estimate
from popo_lightning.cli.plan.run_settings import DDP, FSDP, SERVERS, TRANSFORMERS, VLLM, WHOLE, Engine, RunSettings
from popo_lightning.cli.plan.table import table
from popo_lightning.cli.plan.verdict import objection

BILLION = 10**9
# A made-up model of a billion parameters, with 1000 bytes per token and layer group (see KEPT).
BIG = Architecture(
    parameters=BILLION,
    trained=BILLION,
    cast=BILLION,
    critic=BILLION,
    critic_trained=BILLION,
    critic_cast=BILLION,
    layer=BILLION // 20,
    root=BILLION // 5,
    vocabulary=100_000,
    hidden=1000,
    feed_forward=4000,
    cache_elements=20_000,
    vision=None,
)
LARGE = GivenActivations(BIG)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GivenActivations:
    return GivenActivations(model("tiny", tmp_path_factory.mktemp("tiny")).architecture)


def settings(**changes: Any) -> RunSettings:
    vllm = Engine(VLLM, share=0.9, sleep_level=2)
    return replace(RunSettings(engine=vllm), **changes)


def with_settings_of(sentence: str, run: RunSettings) -> RunSettings:
    """Returns the run with the settings that a refusal suggests."""
    for name, value in re.findall(r"(\S+) to (\S+)", sentence.partition("; set ")[2]):
        if name == "data.engine.gpu_memory_utilization":
            run = replace(run, engine=replace(run.engine, share=float(value)))
        elif name == "data.engine.sleep_level":
            run = replace(run, engine=replace(run.engine, sleep_level=int(value)))
        elif name == "data.engine.batch_size":
            run = replace(run, engine=replace(run.engine, batch_size=int(value)))
        elif name == "model.micro_batch_tokens":
            run = replace(run, micro_batch_tokens=int(value))
        elif name == "model.gradient_checkpointing":
            run = replace(run, gradient_checkpointing=True)
        elif name == "model.gradient_sync":
            run = replace(run, gradients_held_whole=False)
        else:
            assert (name, value) == ("trainer.strategy", "ModelParallelStrategy")
            run = replace(run, layout=FSDP)
    return run


def test_what_fits_is_not_refused() -> None:
    assert objection(settings(engine=Engine(SERVERS)), LARGE, 80 * GIB) is None


def test_exactly_the_peak_fits_and_a_byte_less_does_not() -> None:
    run = settings(engine=Engine(SERVERS))
    peak = max(estimate(run, LARGE, None).peaks.values())
    assert objection(run, LARGE, peak) is None
    assert objection(run, LARGE, peak - 1) is not None


SINGLE = {  # what is wrong, and the one setting that helps
    "data.engine.gpu_memory_utilization to 0.74": settings(),
    "data.engine.sleep_level to 2": settings(engine=Engine(VLLM, share=0.4, sleep_level=0), micro_batch_tokens=4096),
    "trainer.strategy to ModelParallelStrategy": settings(
        ranks=8, layout=DDP, engine=Engine(SERVERS), optimizer=replace(RunSettings().optimizer, bytes_kept=60.0)
    ),
    "model.gradient_sync to micro_batch": settings(
        ranks=64, layout=FSDP, engine=Engine(SERVERS), gradients_held_whole=True
    ),
}
CARDS = {
    "data.engine.gpu_memory_utilization to 0.74": 48,
    "data.engine.sleep_level to 2": 22,
    "trainer.strategy to ModelParallelStrategy": 60,
    "model.gradient_sync to micro_batch": 8,
}


@pytest.mark.parametrize("words", SINGLE)
def test_the_setting_that_helps_is_named_alone(words: str) -> None:
    run, card = SINGLE[words], CARDS[words] * GIB
    sentence = objection(run, LARGE, card)
    assert sentence is not None
    assert sentence.partition("; set ")[2].startswith(words) and " and " not in sentence.partition("; set ")[2]
    assert objection(with_settings_of(sentence, run), LARGE, card) is None


def test_fewer_tokens_and_checkpointing_help_where_activations_do_not_fit(tiny: GivenActivations) -> None:
    run = settings(engine=Engine(SERVERS), micro_batch_tokens=2**20, problems=10**5)
    peak = max(estimate(run, tiny, None).peaks.values())
    sentence = objection(run, tiny, peak - 1)
    assert sentence is not None and sentence.endswith("set model.micro_batch_tokens to 524288")
    shortest = replace(run, micro_batch_tokens=run.sequence_tokens)
    peak = max(estimate(shortest, tiny, None).peaks.values())
    sentence = objection(shortest, tiny, peak - 1)
    assert sentence is not None and sentence.endswith("set model.gradient_checkpointing to true")


def test_fewer_responses_side_by_side(tiny: GivenActivations) -> None:
    run = settings(engine=Engine(TRANSFORMERS, batch_size=512))
    peak = max(estimate(run, tiny, None).peaks.values())
    sentence = objection(run, tiny, peak - 1)
    assert sentence is not None and sentence.endswith("set data.engine.batch_size to 128")  # there are only 256


def test_a_run_that_nothing_helps() -> None:
    sentence = objection(settings(), LARGE, GIB)
    assert sentence is not None and "no setting of it is enough" in sentence and "smaller model" in sentence


def test_a_cache_without_room_for_a_sequence_is_refused(tiny: GivenActivations) -> None:
    sentence = objection(settings(engine=Engine(VLLM, share=0.0004, sleep_level=2)), tiny, 40 * GIB)
    assert sentence is not None
    for words in ("data.engine.gpu_memory_utilization is 0.0004", "2048 tokens", "raise it"):
        assert words in sentence
    on_cpu = settings(on_gpu=False, engine=Engine(VLLM, cpu_cache=2**10))
    sentence = objection(on_cpu, tiny, None)
    assert sentence is not None and "data.engine.cpu_cache_gib" in sentence


def test_without_a_card_nothing_is_compared() -> None:
    assert objection(settings(), LARGE, None) is None


DISK = [  # iterations, every, kept: most files on disk at once; None if the plan cannot say or none is written
    ((100, 20, 1), 2),
    ((100, 20, 3), 4),
    ((100, 20, 5), 5),
    ((100, 20, 9), 5),
    ((100, 20, -1), 5),
    ((20, 20, 1), 1),
    ((0, 20, 1), 2),
    ((0, 20, -1), None),
    ((100, None, 1), 1),  # the final one
    ((19, 20, 1), 1),
    ((21, 20, 1), 2),
    ((21, 20, -1), 2),
    ((21, 20, 2), 2),
    ((1, 20, 5), 1),
    ((100, 20, 0), None),
]


@pytest.mark.parametrize(("numbers", "files"), DISK)
def test_checkpoints_on_the_disk(numbers: tuple[int, int | None, int], files: int | None) -> None:
    iterations, every, kept = numbers
    run = settings(iterations=iterations, checkpoint_every=every, checkpoints_kept=kept)
    lines = table(run, LARGE, estimate(run, LARGE, None), None).splitlines()
    found = [line.split()[-2] for line in lines if "on the disk" in line]
    assert found == ([] if files is None else [f"{files * 12 * BILLION / GIB:.2f}"])


def drawn(draw: Random) -> RunSettings:
    """Returns random but valid settings."""
    layout = draw.choice((WHOLE, DDP, FSDP))
    ranks = 1 if layout == WHOLE else draw.choice((1, 2, 8, 1000))
    engines = (
        Engine(
            VLLM, share=draw.uniform(1e-3, 0.999), sleep_level=draw.choice((0, 1, 2)), cpu_cache=draw.randrange(10**12)
        ),
        Engine(TRANSFORMERS, batch_size=draw.randint(1, 10**4)),
        Engine(SERVERS),
    )
    number = lambda: int(10 ** draw.uniform(0, 5))  # noqa: E731
    return RunSettings(
        on_gpu=draw.random() < 0.8,
        ranks=ranks,
        layout=layout,
        bucket_view=draw.random() < 0.5,
        autocast=draw.random() < 0.5,
        has_critic=draw.random() < 0.3,
        has_reference=draw.random() < 0.3,
        gradients_held_whole=layout == FSDP and draw.random() < 0.5,
        entropy_gradient=draw.random() < 0.5,
        micro_batch_tokens=number(),
        gradient_checkpointing=draw.random() < 0.5,
        problems=number() * ranks,
        group_size=1 + number(),
        minibatches=draw.randint(1, 8),
        ppo_epochs=draw.randint(1, 4),
        prompt_tokens=number(),
        response_tokens=number(),
        evaluation_tokens=number(),
        engine=draw.choice(engines),
        iterations=number(),
        checkpoint_every=draw.choice((None, 1, 20)),
        checkpoints_kept=draw.choice((-1, 0, 1, 3)),
    )


def helped_by_all(run: RunSettings, planned: GivenActivations, card: int | None) -> bool:
    """Returns whether all changes at once, with some share, make the run fit."""
    most = replace(run, micro_batch_tokens=1, gradient_checkpointing=True, gradients_held_whole=False)
    if run.ranks > 1:
        most = replace(most, layout=FSDP)
    level = run.engine.sleep_level or 2
    small = replace(run.engine, sleep_level=level, batch_size=1)
    engines = [replace(small, share=run.engine.share * part / 20) for part in range(1, 21)]
    return any(objection(replace(most, engine=engine), planned, card) is None for engine in engines)


def test_any_numbers_are_planned_or_refused_in_one_sentence_that_is_true(tiny: GivenActivations) -> None:
    draw = Random(0)
    outcomes = {"fits": 0, "helped": 0, "not helped": 0}
    for _ in range(4000):
        run, planned = drawn(draw), draw.choice((tiny, LARGE))
        card = int(10 ** draw.uniform(9, 11.5)) if run.on_gpu and draw.random() < 0.8 else None
        memory = estimate(run, planned, card)
        assert all(size >= 0 for of in (memory.always, memory.backward, memory.step) for size in of.values())
        assert "an estimate" in table(run, planned, memory, card)
        sentence = objection(run, planned, card)
        if sentence is None:
            outcomes["fits"] += 1
            assert card is None or max(memory.peaks.values()) <= card
            continue
        assert "\n" not in sentence and len(sentence) < 600
        if "; set " not in sentence:
            outcomes["not helped"] += 1
            assert "too little" in sentence or not helped_by_all(run, planned, card), sentence
            continue
        outcomes["helped"] += 1
        assert objection(with_settings_of(sentence, run), planned, card) is None, sentence
    assert min(outcomes.values()) > 50, outcomes
