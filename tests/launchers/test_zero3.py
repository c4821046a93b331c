"""``--sharding zero3``: real runs under the agent and under accelerate launch, killed and continued; and refusals."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from encdec.errors import ConfigError, ShardingError
from encdec.files import RunPaths
from encdec.training.execution import TrainingPhase
from encdec.training.run_config import RunConfig, resolve_run
from encdec.training.sharding import require_engine
from launchers.submit import main
from tests.conftest import MICRO, REPOSITORY, Lab, kill_everything, losses, wait_for_step

ZERO = ("--sharding", "zero3")
SHORT = ("--set", "training.num_train_steps=40")
ACCELERATE = (
    str(Path(sys.executable).parent / "accelerate"), "launch", "--config_file",
    str(REPOSITORY / "configs" / "accelerate_deepspeed.yaml"), "--num_processes", "2", "--main_process_port", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(session_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    root = tmp_path_factory.mktemp("zero3")
    code, output = Lab(root, session_folder / "packed").submit(root / "run", *ZERO, *SHORT)
    assert code == 0, output
    assert "ZeRO-3" in output and "complete" in output
    return RunPaths(root / "run")


def test_killed_run_ends_bit_identical_under_the_other_launcher(lab: Lab, undisturbed: RunPaths):
    paths = RunPaths(lab.root / "run")
    process = lab.start_submit(paths.root, *ZERO, *SHORT)
    wait_for_step(paths, 20)
    kill_everything(paths)
    process.communicate(timeout=120)
    code, output = lab.submit(paths.root, *ZERO, *SHORT, "--launcher", "accelerate")
    assert code == 0, output
    assert "continuing from step 15" in (paths.attempt(1).rank_logs(0) / "rank-0.restart-0.err").read_text()
    assert losses(paths) == losses(undisturbed)
    assert lab.digest(paths.checkpoints / "step-40") == lab.digest(undisturbed.checkpoints / "step-40")


def test_accelerate_launch_by_hand_computes_the_same(lab: Lab, undisturbed: RunPaths):
    paths = RunPaths(lab.root / "by hand")
    arguments = ("--phase", "sanity_check", "--output_dir", str(paths.root), *lab.arguments(*SHORT))
    code, output = lab.run("encdec.train", *arguments, "--set", "infra.distributed_type=deepspeed", launcher=ACCELERATE)
    assert code == 0, output
    assert "ZeRO-3 over 2 ranks: 35,072 parameters, 17,536 on this rank" in output
    assert losses(paths) == losses(undisturbed)


def test_without_deepspeed_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "deepspeed" else find(name))
    command = ["--phase", "sanity_check", "--config", str(MICRO), "--cluster", "local"]
    assert main([*command, "--run-dir", str(tmp_path / "run"), *ZERO]) == 78
    told = capsys.readouterr().err
    assert told.startswith("error: infra.distributed_type=deepspeed (--sharding zero3) needs DeepSpeed")
    assert "python -m pip install --no-build-isolation" in told and "--sharding fsdp2" in told
    assert not list(tmp_path.iterdir())


def resolved(*settings: str) -> RunConfig:
    return resolve_run(TrainingPhase.SANITY_CHECK, config_file=MICRO, settings=settings)


DEEPSPEED = "infra.distributed_type=deepspeed"
# DeepSpeed's file -> words of the message
REFUSED = {
    '{"optimizer": {"type": "Adam"}}': ("ds.json: every key must be known", "found optimizer"),
    '{"zero_optimization": {"stage": 2}}': ("ds.json: zero_optimization.stage", "3", "found 2"),
    '{"zero_optimization": {"reduce_buckets": 3}}': ("zero_optimization.reduce_buckets", "Write reduce_bucket_size"),
    '{"zero_optimization": {"offload_param": {"device": "nvme"}}}': ("offload_param.device", "'cpu'", "'nvme'"),
    '{"train_batch_size": 8}': ("train_batch_size", "'auto'", "the run's own keys decide"),
    '{"gradient_clipping": 0.5}': ("gradient_clipping must agree with training.max_grad_norm=1.0", "found 0.5"),
    '{"bf16": {"enabled": true}}': ("bf16.enabled must agree with training.bf16=False", "found True"),
    '{"fp16": {"enabled": true}}': ("fp16.enabled must agree with training.fp16=False", "found True"),
    "{]": ("must be a JSON file", "ds.json: Expecting"),
}


@pytest.mark.parametrize("text", REFUSED)
def test_deepspeed_s_file_may_not_contradict_the_run(tmp_path: Path, text: str):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolved(DEEPSPEED, f"infra.deepspeed_config={tmp_path / 'ds.json'}")
    for word in REFUSED[text]:
        assert word in str(caught.value)


def test_keys_of_one_engine_are_not_for_the_other(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"deepspeed_config goes with infra\.distributed_type=deepspeed"):
        resolved("infra.deepspeed_config=ds.json")
    with pytest.raises(ConfigError, match=r"must be FULL_SHARD, found SHARD_GRAD_OP"):
        resolved(DEEPSPEED, "infra.fsdp_sharding_strategy=SHARD_GRAD_OP")
    with pytest.raises(ConfigError, match=r"readable JSON file, found .*/nowhere\.json \(No such file"):
        resolved(DEEPSPEED, f"infra.deepspeed_config={tmp_path}/nowhere.json")


def test_run_keeps_the_file_s_text_not_its_path(tmp_path: Path):
    knobs = {"zero_optimization": {"reduce_bucket_size": 5e8}, "train_batch_size": "auto"}
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(knobs))
    runs = [resolved(DEEPSPEED, f"infra.deepspeed_config={tmp_path / name}") for name in ("a.json", "b.json")]
    kept = runs[0].config.infra.deepspeed_config
    assert kept is not None and json.loads(kept) == knobs
    assert runs[0].identity == runs[1].identity != resolved(DEEPSPEED).identity


@pytest.mark.parametrize(
    ("setting", "environment", "words"),
    [
        (DEEPSPEED, {"ACCELERATE_USE_FSDP": "true"}, ("found fsdp from accelerate", "accelerate_deepspeed.yaml")),
        ("training.seed=1", {"ACCELERATE_USE_DEEPSPEED": "true"}, ("found deepspeed from", "accelerate_fsdp2.yaml")),
        (DEEPSPEED, {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, ("ZeRO stage 2",)),
        (DEEPSPEED, {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, ("offload to nvme", "none or cpu")),
        (DEEPSPEED, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "x.json"}, ("x.json", "not infra.deepspeed_config")),
    ],
)
def test_launcher_s_engine_must_be_the_run_s(monkeypatch: pytest.MonkeyPatch, setting, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ShardingError, match="must name the same engine") as caught:
        require_engine(resolved(setting).config.infra)
    for word in words:
        assert word in str(caught.value)
