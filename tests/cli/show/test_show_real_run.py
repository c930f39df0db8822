"""popo show reads the files that popo fit writes."""

from __future__ import annotations

import shlex
from pathlib import Path

from helpers.tiny_models import method, popo

from popo_lightning.cli.shipped_configs import with_config_names
from popo_lightning.cli.show.runs import Limits, read_run


def test_a_run_of_popo_fit_is_shown_whole(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "popo run"
    command = ["fit", "--config", config, *method("popo"), "--run.folder", folder, "--trainer.max_epochs", "3"]
    command += ["--samples.every_n_iterations", "1"]
    popo(*command)
    run = read_run(folder, "run", Limits(samples=1000, evaluated=1000, images=0))
    assert (
        run["command"] == shlex.join(["popo", *with_config_names([str(word) for word in command])])
        and run["finished"]
        and run["iterations"] == 3
    )
    assert run["skipped"] == {} and run["settings"]["data.composer.init_args.buffer.init_args.max_age"] == "8"
    assert set(run["leftOut"].values()) == {0}
    trained = [group for group in run["groups"] if "evaluated" not in group]
    assert {group["iteration"] for group in trained} == {1, 2, 3} and {group["fresh"] for group in trained} == {
        True,
        False,
    }
    for group in trained:
        ages = [response["age"] for response in group["responses"]]
        assert (max(ages) == 0) == group["fresh"] and '"target"' in group["gold"] and group["prompt"][0]["text"]
        assert all({"score", "acc"} <= response["parts"].keys() for response in group["responses"])
    assert any("advantage" in response for group in trained for response in group["responses"])
    assert len(run["groups"]) - len(trained) == 12, "problems of the last evaluation"
    shares = {name: values for name, values in run["columns"].items() if name.startswith("weight/share_age_")}
    at_the_end = sum(values[-1] or 0.0 for values in shares.values())
    assert "weight/share_age_0" in shares and abs(at_the_end - 1) < 1e-4
