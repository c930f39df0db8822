"""Balance, failover and checks of ServerEngine, against servers that fail on purpose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.processes import on_two_ranks
from helpers.servers import END, FakeServer
from helpers.tiny_models import random_model

from popo_lightning.core.errors import SettingError
from popo_lightning.core.groups import Response
from popo_lightning.engines.base import EngineContext, Sampling, prompt_seeds
from popo_lightning.engines.servers import client as server_module
from popo_lightning.engines.servers.checks import warn_of_open
from popo_lightning.engines.servers.client import Server
from popo_lightning.engines.servers.engine import ServerEngine
from popo_lightning.engines.servers.weight_files import write_weights
from popo_lightning.model.prompts import Prompt

LIMIT = 6
PROMPTS = [Prompt(torch.tensor([2 + i % 7, 3 + i // 7])) for i in range(24)]
WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model("llama-tied", tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "PROBE_SECONDS", 1.5)  # long enough for a busy machine


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    made = [FakeServer(), FakeServer()]
    yield made
    for server in made:
        server.close()


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., ServerEngine]]:
    engines: list[ServerEngine] = []

    def started(servers: list[FakeServer], sync: bool = True, **settings: Any) -> ServerEngine:
        settings = {"start_seconds": 0.2, "request_seconds": 5.0} | settings
        engines.append(ServerEngine([server.url for server in servers], **settings))
        engines[-1].start(EngineContext(folder, torch.device("cpu"), torch.float32, 0, 1, 64, [17]))
        if sync:
            engines[-1].update_weights(WEIGHTS.items(), 5)
        return engines[-1]

    yield started
    for engine in engines:
        engine.stop()


def generate(engine: ServerEngine, seed: int = 3, n: int = 2, **sampling: Any) -> list[list[Response]]:
    return engine.generate(PROMPTS, n, Sampling(LIMIT, **sampling), seed)


def tokens(found: list[list[Response]]) -> list[list[list[int]]]:
    return [[response.token_ids.tolist() for response in responses] for responses in found]


def without_forbidden(answer: dict[str, Any]) -> dict[str, Any]:
    """Replaces forbidden tokens, because the noise does not know them."""
    for choice in answer["choices"]:
        choice["token_ids"] = [16 if token == 17 else token for token in choice["token_ids"]]
        for entry in choice["logprobs"]["content"]:
            entry["token_id"] = 16 if entry["token_id"] == 17 else entry["token_id"]
    return answer


@pytest.fixture(autouse=True)
def obedient(servers: list[FakeServer]) -> None:
    for server in servers:
        server.mangle = without_forbidden


# -- requests --------------------------------------------------------------------------------------------------


def test_what_is_asked_and_what_comes_back(servers: list[FakeServer], start: Any) -> None:
    engine = start(servers)
    prompts = [Prompt(torch.tensor([2, 3])), Prompt(torch.tensor([4, 5, 6]), prefix_len=2)]
    found = engine.generate(prompts, 3, Sampling(LIMIT, 0.7), seed=1)
    asked = sorted((r for s in servers for r in s.requests), key=lambda r: len(r["token_ids"]))
    assert [request["token_ids"] for request in asked] == [[2, 3], [4, 5, 6]]
    assert [request["sampling_params"]["max_tokens"] for request in asked] == [LIMIT, LIMIT - 2]
    assert asked[0]["sampling_params"] | {"seed": 0} == {
        "n": 3,
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "max_tokens": LIMIT,
        "seed": 0,
        "stop_token_ids": [END],
        "logprobs": 0,
        "logit_bias": {"17": -float("inf")},
        "stop": [],
        "detokenize": False,
    }
    assert asked[0]["sampling_params"]["seed"] != asked[1]["sampling_params"]["seed"]
    for responses in found:
        assert len(responses) == 3
        for response in responses:
            assert response.token_ids.dtype == torch.long and response.behave_logp.dtype == torch.float32
            assert (response.finish_reason == "stop") == (int(response.token_ids[-1]) == END)
            assert "<" not in response.text and bool(response.text) == (response.token_ids.tolist() != [END])


def test_greedy_responses_are_asked_for_once(servers: list[FakeServer], start: Any) -> None:
    found = generate(start(servers), n=4, temperature=0.0)
    assert all(request["sampling_params"]["n"] == 1 for server in servers for request in server.requests)
    assert all(len(r) == 4 and r[0].token_ids.tolist() == r[3].token_ids.tolist() for r in found)


def test_a_response_with_a_temperature_of_its_own_is_asked_for_by_itself(servers: list[FakeServer], start: Any) -> None:
    sampling = Sampling(LIMIT, 1.0, temperature_spread=0.3)
    found = start(servers).generate(PROMPTS[:2], 3, sampling, 3)
    asked = {r["sampling_params"]["seed"]: r["sampling_params"] for server in servers for r in server.requests}
    seeds = [[first + i for i in range(3)] for first in prompt_seeds(3, 2)]
    assert sorted(asked) == sorted(seed for of in seeds for seed in of)
    assert all(one["n"] == 1 and one["temperature"] == sampling.temperature_of(seed) for seed, one in asked.items())
    assert [[r.temperature for r in responses] for responses in found] == [
        [asked[seed]["temperature"] for seed in of] for of in seeds
    ]


def test_the_less_busy_server_is_asked(servers: list[FakeServer], start: Any) -> None:
    servers[0].seconds, servers[1].seconds = 0.15, 0.01
    engine = start(servers, requests_per_server=3)
    generate(engine)
    assert 3 <= len(servers[0].requests) < len(servers[1].requests)
    assert [server.most <= 3 for server in servers] == [True, True]
    assert [server.outstanding for server in engine.pool.servers] == [0, 0]


def test_a_call_is_the_same_whichever_server_takes_it(servers: list[FakeServer], start: Any) -> None:
    both, one = start(servers), start(servers[:1])
    found = generate(both)
    both.update_weights(WEIGHTS.items(), 5)
    assert tokens(generate(both)) == tokens(found) != tokens(generate(both, seed=4))
    one.update_weights(WEIGHTS.items(), 5)
    assert tokens(generate(one)) == tokens(found)


# -- failures --------------------------------------------------------------------------------------------------


def test_a_server_that_dies_is_dropped_and_comes_back(servers: list[FakeServer], start: Any) -> None:
    engine = start(servers, requests_per_server=2)
    whole = tokens(generate(engine))
    asked_before = len(servers[1].requests)
    servers[0].dies_after = len(servers[0].requests)  # at the first: it is asked before the other, both being idle
    assert tokens(generate(engine)) == whole
    assert [server.alive for server in engine.pool.servers] == [False, True]
    assert len(servers[1].requests) - asked_before == len(PROMPTS)
    engine.update_weights(WEIGHTS.items(), 6)  # goes to the remaining server
    assert len(generate(engine)) == len(PROMPTS)
    servers[0].hangs, servers[0].dies_after = False, None
    engine.update_weights(WEIGHTS.items(), 7)
    assert [server.alive for server in engine.pool.servers] == [True, True]
    assert servers[0].version == servers[1].version
    assert tokens(generate(engine)) == whole


def test_a_server_that_dies_before_it_forgets_prompts_is_dropped(servers: list[FakeServer], start: Any) -> None:
    engine = start(servers)
    servers[0].hangs = True
    servers[0].released.set()  # breaks connections, as a dead server does
    engine.forget_prompts()
    assert [server.alive for server in engine.pool.servers] == [False, True]
    assert len(generate(engine)) == len(PROMPTS)
    servers[1].close()
    with pytest.raises(RuntimeError, match="did not drop their cached prefixes: none of them answers"):
        engine.forget_prompts()


def forgets(urls: list[str], folder: Path) -> tuple[str, list[bool]]:
    """Returns what this rank raises if rank 0 drops the prefixes, and which servers this rank goes on with."""
    dist.init_process_group("gloo")
    server_module.RESET_TRIES = 2
    engine = ServerEngine(urls)
    engine._context = EngineContext(folder, torch.device("cpu"), torch.float32, dist.get_rank(), 2, 64, [17])
    try:
        engine.forget_prompts()
    except RuntimeError as error:
        return str(error), []
    finally:
        dist.destroy_process_group()
    return "", [server.alive for server in engine.pool.servers]


@pytest.mark.parametrize("refuses", [False, True])
def test_all_ranks_forget_prompts_or_fail(servers: list[FakeServer], tmp_path: Path, refuses: bool) -> None:
    urls = [server.url for server in servers]
    servers[0].close()
    servers[1].reset_succeeds = not refuses
    first, second = on_two_ranks(forgets, tmp_path, urls, tmp_path, seconds=60)
    assert first == second
    assert ("does not reset its prefix cache" in first[0]) if refuses else first == ("", [False, True])


def test_no_server_left(servers: list[FakeServer], start: Any) -> None:
    engine = start(servers)
    for server in servers:
        server.dies_after = 0
    with pytest.raises(RuntimeError, match=r"none of data.engine.urls is left .*127.0.0.1.*serve.sh"):
        generate(engine)
    with pytest.raises(RuntimeError, match="none of them answers"):
        engine.update_weights(WEIGHTS.items(), 6)


@pytest.mark.slow
def test_a_server_that_falls_silent_is_noticed_before_its_time_is_up(servers: list[FakeServer], start: Any) -> None:
    engine = start(servers, request_seconds=60.0)
    servers[0].hangs = True
    began = time.monotonic()
    assert len(generate(engine)) == len(PROMPTS)
    assert time.monotonic() - began < 30
    assert [server.alive for server in engine.pool.servers] == [False, True]


def test_a_request_that_takes_too_long_goes_elsewhere(
    servers: list[FakeServer], start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(servers, request_seconds=1.5)
    monkeypatch.setattr(Server, "answers", lambda self: True)  # the servers are healthy, so they stay
    servers[0].seconds = 4.0
    assert len(engine.generate(PROMPTS[:4], 2, Sampling(LIMIT), 0)) == 4
    assert [server.alive for server in engine.pool.servers] == [True, True]
    servers[1].seconds = 4.0
    with pytest.raises(RuntimeError, match=r"failed 3 times: .*(no answer in time|timed out)"):
        engine.generate(PROMPTS[:4], 2, Sampling(LIMIT), 0)


def test_the_longest_wait_follows_what_a_server_may_have_before_it(
    servers: list[FakeServer], start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    ask = Server.ask

    def noted(self: Server, method: str, path: str, body: Any = None, seconds: float = 60.0, most: int = 2**20) -> Any:
        if path == "/inference/v1/generate":
            waits.append(seconds)
        return ask(self, method, path, body, seconds, most)

    monkeypatch.setattr(Server, "ask", noted)
    engine = start(servers, request_seconds=None, requests_per_server=64)
    engine.generate([PROMPTS[0]], 8, Sampling(8192), 0)
    engine.generate([PROMPTS[0]], 8, Sampling(8192, temperature=0.0), 0)  # asked once, and copied
    assert waits == pytest.approx([600 + 64 * 8 * 8192 / 1000, 600 + 64 * 8192 / 1000])


def test_a_refusal_is_not_repeated(servers: list[FakeServer], start: Any) -> None:
    engine = start(servers)
    for server in servers:
        server.status = 403
    with pytest.raises(RuntimeError, match=r"refuses \(403\).*not this way"):
        engine.generate(PROMPTS[:1], 2, Sampling(LIMIT), 0)
    assert sum(len(server.requests) for server in servers) == 1


def test_another_version_is_never_trained_on(servers: list[FakeServer], start: Any) -> None:
    engine = start(servers)
    servers[0].version = "default"  # as after a restart
    assert len(generate(engine)) == len(PROMPTS)
    assert [server.alive for server in engine.pool.servers] == [False, True]
    servers[1].version = "another run's"
    with pytest.raises(RuntimeError, match=r"none of data.engine.urls is left"):
        generate(engine)


def test_a_change_of_version_inside_a_response_is_seen(servers: list[FakeServer], start: Any) -> None:
    engine = start(servers[:1])

    def mixed(answer: dict[str, Any]) -> dict[str, Any]:
        answer["choices"][1]["weight_versions"].append({"version": "old", "start": 0, "end": 1})
        return answer

    servers[0].mangle = mixed
    with pytest.raises(RuntimeError, match=r"none of data.engine.urls is left"):
        generate(engine)


def choice(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(answer: dict[str, Any]) -> Any:
        answer["choices"][0][name] = value
        return answer

    return change


def entry(**values: Any) -> Callable[[dict[str, Any]], Any]:
    def change(answer: dict[str, Any]) -> Any:
        answer["choices"][0]["logprobs"]["content"][0].update(values)
        return answer

    return change


def response(ids: list[Any], reason: str) -> Callable[[dict[str, Any]], Any]:
    def change(answer: dict[str, Any]) -> Any:
        content = [{"token_id": token, "logprob": -1.0} for token in ids]
        answer["choices"][0] |= {"token_ids": ids, "finish_reason": reason, "logprobs": {"content": content}}
        return answer

    return change


MALFORMED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no json": lambda answer: b"<html>",
    "nested without end": lambda answer: b"[" * 100_000,
    "a list": lambda answer: [answer],
    "nothing": lambda answer: None,
    "no choices": lambda answer: {"prompt_token_ids": answer["prompt_token_ids"]},
    "another prompt": lambda answer: answer | {"prompt_token_ids": [9]},
    "too few": lambda answer: answer | {"choices": answer["choices"][:1]},
    "twice the same": lambda answer: answer | {"choices": answer["choices"][:1] * 2},
    "index text": choice("index", "0"),
    "ids text": choice("token_ids", "abc"),
    "logprobs null": choice("logprobs", None),
    "aborted": choice("finish_reason", "abort"),
    "no version": choice("weight_versions", None),
    "empty": response([], "stop"),
    "too long": response([3] * (LIMIT + 1), "length"),
    "too short": response([3], "length"),
    "no token": response([3, 99, 1], "stop"),
    "negative token": response([-3, 1], "stop"),
    "half a token": response([3.5, 1], "stop"),
    "true": response([True, 1], "stop"),
    "forbidden": response([17, 1], "stop"),
    "behind the end": response([1, 3, 1], "stop"),
    "stopped without end": response([3, 3], "stop"),
    "log-prob above 0": entry(logprob=0.5),
    "log-prob nan": entry(logprob=float("nan")),
    "log-prob minus infinity": entry(logprob=-float("inf")),
    "log-prob that stands for it": entry(logprob=-9999.0),
    "log-prob missing": entry(logprob=None),
    "log-prob of another": entry(token_id=19.0),
    "longer than any": lambda answer: answer | {"padding": "x" * 2**18},
}


@pytest.mark.parametrize("mangle", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_answers(servers: list[FakeServer], start: Any, mangle: Callable[[dict[str, Any]], Any]) -> None:
    """The request is repeated on another server. If there is none, the run stops with a message."""
    engine, good = start(servers), servers[1].mangle
    for server in servers:
        server.mangle = lambda answer: mangle(without_forbidden(answer))
    with pytest.raises(RuntimeError, match="failed 3 times"):
        engine.generate(PROMPTS[:2], 2, Sampling(LIMIT), 0)
    servers[1].mangle = good
    assert len(engine.generate(PROMPTS[:2], 2, Sampling(LIMIT), 0)) == 2


def test_stop_strings(servers: list[FakeServer], start: Any, folder: Path) -> None:
    """Stop strings are requested. A response that continues after one is cut. One that stops without one is refused."""
    engine = start(servers)
    free = generate(engine)
    texts = [r.text for responses in free for r in responses]
    stop = max("".join(texts), key="".join(texts).count)
    found = generate(engine, stop=(stop,))
    asked = servers[0].requests[-1]["sampling_params"]
    assert asked["stop"] == [stop] and asked["detokenize"] is True
    cut = 0
    for before, after in zip(chain(*free), chain(*found), strict=True):
        assert after.token_ids.tolist() == before.token_ids[: len(after.token_ids)].tolist()
        assert after.text == before.text.partition(stop)[0]
        assert after.finish_reason == ("stop" if stop in before.text else before.finish_reason)
        cut += stop in before.text
    assert cut > 3
    ids = engine._tokenizer(stop, add_special_tokens=False)["input_ids"]
    for server in servers:
        server.mangle = response([3, *ids], "stop")
    one, two = engine.generate(PROMPTS[:1], 1, Sampling(LIMIT, stop=(stop,)), 0)[0] * 2
    assert one.token_ids.tolist() == two.token_ids.tolist() == [3, *ids]
    with pytest.raises(RuntimeError, match="ends without one"):
        engine.generate(PROMPTS[:1], 1, Sampling(LIMIT, stop=("no such text",)), 0)


# -- weights ---------------------------------------------------------------------------------------------------


def test_weights_arrive_and_leave_nothing_behind(servers: list[FakeServer], start: Any, tmp_path: Path) -> None:
    engine = start(servers, weights_folder=str(tmp_path))
    assert engine.version == 5
    for server in servers:
        assert server.weights.keys() == WEIGHTS.keys()
        assert all(torch.equal(server.weights[name], weight) for name, weight in WEIGHTS.items())
        order = [path for path in server.paths if path not in ("/health", "/version")]
        assert order[1:] == [  # the description comes first
            "/update_weight_version",
            "/collective_rpc",
            "/reset_prefix_cache",
            "/update_weight_version",
            "/weight_info",
        ]
        assert server.version.endswith("-5")
    assert list(tmp_path.iterdir()) == []
    before = servers[0].version
    engine.update_weights(WEIGHTS.items(), 5)
    assert servers[0].version != before, "every sync has a label of its own, whatever the policy's version"
    engine._context = replace(engine._context, as_saved=lambda weights: ((f"saved.{n}", w) for n, w in weights))
    engine.update_weights(WEIGHTS.items(), 6)
    assert servers[1].weights.keys() == {f"saved.{name}" for name in WEIGHTS}


def test_weights_are_asked_for_on_all_ranks_and_files_are_small(tmp_path: Path) -> None:
    asked: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abcde":
            asked.append(name)
            yield name, torch.ones(10)

    write_weights(weights(), None)
    assert asked == list("abcde")
    write_weights(weights(), tmp_path / "files", file_bytes=80)
    assert len(list((tmp_path / "files").iterdir())) == 3
    (tmp_path / "file").touch()
    del asked[:]
    with pytest.raises(OSError):
        write_weights(weights(), tmp_path / "file" / "folder", file_bytes=80)
    assert asked == list("abcde"), "other ranks would wait for ever"


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("load_answer", {"error": "ValueError: shapes"}, "shapes"),
        ("load_answer", {"files": 0}, "files"),
        ("says_version", "another", "instead of"),
    ],
)
def test_a_server_without_the_weights_stops_the_run(
    servers: list[FakeServer], start: Any, attribute: str, value: Any, message: str
) -> None:
    engine = start(servers)
    setattr(servers[1], attribute, value)
    with pytest.raises(RuntimeError, match=message):
        engine.update_weights(WEIGHTS.items(), 6)


def test_a_cache_that_is_not_reset_stops_the_run(
    servers: list[FakeServer], start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(servers)
    monkeypatch.setattr("popo_lightning.engines.servers.client.RESET_TRIES", 2)
    servers[1].reset_succeeds = False
    with pytest.raises(RuntimeError, match="does not reset its prefix cache"):
        engine.update_weights(WEIGHTS.items(), 6)


# -- start and settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("dtype", "bfloat16", "has dtype bfloat16, but this run needs float32"),
        ("logprobs_mode", "raw_logprobs", "needs processed_logprobs"),
        ("generation_config", "auto", "needs vllm"),
        ("max_model_len", 63, "takes 63 tokens"),
        ("max_model_len", None, "takes None tokens"),
    ],
)
def test_servers_that_sample_otherwise(
    servers: list[FakeServer], start: Any, name: str, value: Any, message: str
) -> None:
    servers[1].description[name] = value
    with pytest.raises(SettingError, match=message):
        start(servers)


@pytest.mark.parametrize("version", ["0.31.2", "0.20.0", "0.31.0rc1"])
def test_a_vllm_that_is_too_old(servers: list[FakeServer], start: Any, version: str) -> None:
    servers[1].vllm = version
    with pytest.raises(SettingError, match=rf"data.engine.urls runs vLLM {version}.* vLLM 0\.32 or later"):
        start(servers)


@pytest.mark.parametrize("version", ["0.32.0rc1", "0.33.0+cu130", "1.0", "0.1.dev1+gabc", "main", None])
def test_a_vllm_that_may_be_new_enough(servers: list[FakeServer], start: Any, version: str | None) -> None:
    servers[1].vllm = version
    assert len(generate(start(servers))) == len(PROMPTS)


def test_a_server_that_is_not_there(servers: list[FakeServer], start: Any, caplog: pytest.LogCaptureFixture) -> None:
    gone = FakeServer()
    gone.close()
    engine = start([gone, servers[0]])
    assert "is left out until the next sync" in caplog.text
    assert len(generate(engine)) == len(PROMPTS)
    with pytest.raises(SettingError, match=r"none of data.engine.urls answers .*serve.sh"):
        start([gone])


def test_a_server_of_another_kind(servers: list[FakeServer], start: Any) -> None:
    servers[0].description = {"error": "no such method"}
    with pytest.raises(SettingError, match=r"serve\.sh"):
        start(servers)


def test_nothing_is_sampled_before_the_first_sync(servers: list[FakeServer], start: Any) -> None:
    engine = start(servers, sync=False)
    assert engine.version == -1
    with pytest.raises(RuntimeError, match="no weights of this run"):
        generate(engine)


def test_images_are_refused(servers: list[FakeServer], start: Any, folder: Path) -> None:
    engine = start(servers)
    with pytest.raises(SettingError, match="sends no images"):
        engine.generate([Prompt(torch.tensor([2]), images={"pixel_values": torch.ones(1)})], 1, Sampling(LIMIT), 0)
    context = EngineContext(folder, torch.device("cpu"), torch.float32, 0, 1, 64, images_per_prompt=1)
    with pytest.raises(SettingError, match="sends no images"):
        engine.start(context)


def test_stop_leaves_the_servers(servers: list[FakeServer], start: Any) -> None:
    engine = start(servers)
    temporary = Path(engine._temporary.name)
    assert temporary.exists()
    engine.stop()
    assert not temporary.exists()
    assert [server.answers() for server in engine.pool.servers] == [True, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"urls": []}, r"data.engine.urls is \[\]"),
        ({"urls": ["http://a:1", "http://a:1"]}, "each once"),
        ({"urls": ["localhost:8000"]}, "has 'localhost:8000'"),
        ({"urls": ["http://127.0.0.1:80x"]}, "has 'http://127.0.0.1:80x'"),
        ({"urls": ["http://node1:8000"]}, "data.engine.weights_folder is null, but http://node1:8000"),
        ({"urls": ["http://127.0.0.1:1"], "attempts": 0}, "data.engine.attempts is 0"),
        ({"urls": ["http://127.0.0.1:1"], "sync_seconds": 0}, "data.engine.sync_seconds is 0"),
        ({"urls": ["http://127.0.0.1:1"], "request_seconds": 0}, "data.engine.request_seconds is 0"),
    ],
)
def test_settings_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ServerEngine(**settings)


def test_open_addresses_are_warned_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    urls = ["http://127.0.0.1:1", "http://10.1.2.3:1", "http://[::1]:1", "http://8.8.8.8:1"]
    engine = ServerEngine(urls, weights_folder=str(tmp_path))
    warn_of_open(engine.pool.servers)
    (warning,) = caplog.messages
    assert "http://8.8.8.8:1" in warning and "have no password" in warning
    assert [Server(url).is_here for url in urls] == [True, False, True, False]
