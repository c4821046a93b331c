"""The pipeline through the launcher: which words go where, and what is refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from encdec.errors import ConfigError
from launchers.pipeline import command_line, main, split
from tests.conftest import REPOSITORY, Lab

CONFIG = str(REPOSITORY / "configs" / "pipeline_tiny.yaml")


def test_words_before_the_mark_are_the_pipelines():
    assert split(["run", "--json", "--", "--nodes", "2"]) == (["run", "--json"], ["--nodes", "2"])
    assert split(["run"]) == (["run"], [])
    assert command_line("a.yaml", "/runs/x", ["--nodes", "2"])[:6] == [
        "--phase", "sanity_check", "--config", "a.yaml", "--run-dir", "/runs/x",
    ]  # fmt: skip


@pytest.mark.parametrize("flags", [["--config", "b.yaml"], ["--run-dir=x"], ["--phase", "full"], ["--name", "n"]])
def test_what_the_pipeline_decides_is_refused(flags: list[str]):
    with pytest.raises(ConfigError, match="The pipeline decides"):
        command_line("a.yaml", "/runs/x", flags)


def test_mistake_in_the_launchers_flags_ends_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert main(["run", "--config", CONFIG, "--checkpoint-dir", str(out), "--", "--nodes", "0"]) == 78
    assert "--nodes must be at least 1" in capsys.readouterr().err and not out.exists()


def test_scale_that_the_launcher_trains_is_judged(lab: Lab):
    out = lab.root / "out"
    words = ["run", "--config", CONFIG, "--checkpoint-dir", str(out), "--set", "training.max_steps=60"]
    code, output = lab.run("launchers.pipeline", *words, "--", "--cluster", "local", "--gpus-per-node", "2")
    assert code == 0, output
    [record] = [json.loads(line) for line in (out / "tiny" / "results.jsonl").read_text().splitlines()]
    assert record["success"] is True and record["step"] == 60
    run = Path(record["run_dir"])
    assert (run / "attempts" / "0" / "outcome.json").is_file()  # the launcher's own run directory
    evidence = json.loads((run / "gates" / "pipeline-standard.json").read_text())
    assert evidence["passed"] is True and {item["gate"] for item in evidence["evidence"]} >= {"perplexity", "no_nan"}
