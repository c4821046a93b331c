"""The model's benchmarks run, on the smallest settings; and the commands that RESULTS.md names are there."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from benchmarks import model
from benchmarks.gpu import __main__ as gpu
from tests.conftest import REPOSITORY


def test_peers_are_measured(tmp_path: Path):
    few = ["--steps", "1", "--rounds", "1", "--batch", "1", "--encoder-tokens", "32"]
    model.main([*few, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    peers = found["peers"]
    assert {"ours", "ours, sdpa", "plain cross-entropy", "separate cross-attention", "T5Gemma 2"} <= set(peers)
    same = [peers[name]["loss"] for name in ("ours", "ours, sdpa", "ours, eager", "plain cross-entropy")]
    assert max(same) - min(same) < 1e-4
    assert found["padded_tokens_per_real_token"] >= 1 and 0 < peers["ours"]["mfu"] < 1


def test_what_has_to_hold_on_a_gpu_holds_here(capsys):
    assert gpu.main(["--no-speed", "--no-compile"]) == 0
    found = json.loads(capsys.readouterr().out)["correctness"]
    assert set(found["attention implementations agree"]) >= {"split, float32", "sdpa, bfloat16"}
    assert set(found["two passes have the same bits"].values()) == {"the same"}


def test_every_command_of_the_results_is_there():
    named = set(re.findall(r"python -m (benchmarks\.[\w.]+)", (REPOSITORY / "benchmarks" / "RESULTS.md").read_text()))
    assert len(named) > 10
    assert not [name for name in named if find_spec(name) is None]
