"""The largest micro-batch that fits: found by each rank under a real limit, agreed on, recorded, used again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from encdec import distributed
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError, EncdecError
from encdec.files import RunPaths
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.records import JsonLinesWriter, event, read_json_lines
from encdec.training import auto_batch
from encdec.training.auto_batch import Place, divisors, record, recorded, settle_micro_batch
from encdec.training.build import empty_twin
from encdec.training.config import FullConfig, TrainingConfig
from encdec.training.execution import TrainingPhase
from encdec.training.rules import settled_micro_batch
from encdec.training.run_config import RunConfig, divide_global_batch, resolve_run
from launchers.arguments import asked_run, parse_submit
from tests.conftest import MICRO, Lab, kill_everything, wait_for_step
from tests.many_ranks import in_ranks

AUTO = ["training.per_device_train_batch_size=auto"]
MB = 10**6


def auto_run(world: int, global_batch: int, *settings: str) -> RunConfig:
    given = [*AUTO, f"training.global_batch_size={global_batch}", *settings]
    return resolve_run(None, config_file=MICRO, settings=given, ranks_per_node=world)


def model_of(run: RunConfig) -> Qwen3ForSeq2SeqLM:
    shape = run.config.model.from_scratch
    assert shape is not None
    return Qwen3ForSeq2SeqLM(
        Qwen3EncoderDecoderConfig(
            vocab_size=512, num_sentinel_tokens=16, sentinel_start_id=496, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0, **shape.model_dump(),
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Settling:
    """Call it in every rank; each has the memory of its own given to it."""

    folder: Path
    megabytes: list[int]
    """By rank; the real allocator says no beyond them."""
    settings: tuple[str, ...] = ()
    global_batch: int = 384

    def __call__(self) -> None:
        auto_batch.free_host_memory = lambda: self.megabytes[dist.get_rank()] * MB
        run, paths = auto_run(dist.get_world_size(), self.global_batch, *self.settings), RunPaths(self.folder)
        attempt = distributed.on_rank_zero(paths.claim_attempt)
        found = self.settle(run, paths, attempt)
        assert set(distributed.gather(found)) == {found}
        total = torch.ones(())
        dist.all_reduce(total)  # the real group is as it was
        assert total == dist.get_world_size()
        if dist.get_rank() == 0:
            (self.folder / "found.json").write_text(json.dumps(found))

    @staticmethod
    def settle(run: RunConfig, paths: RunPaths, attempt: int) -> tuple[int, int]:
        model = model_of(run)
        return settle_micro_batch(
            run, paths, attempt, device=torch.device("cpu"), dtype=torch.float32,
            make_twin=lambda: empty_twin(model, run.config),
        )  # fmt: skip

    @property
    def found(self) -> list[int]:
        return json.loads((self.folder / "found.json").read_text())

    def events(self, attempt: int) -> list[dict[str, object]]:
        lines = read_json_lines(RunPaths(self.folder).attempt(attempt).events("rank-0"))
        return [line for line in lines if line["event"] == "micro_batch_found"]


@dataclass(frozen=True)
class SettlingAgain(Settling):
    """No rank may try anything."""

    def __call__(self) -> None:
        auto_batch.Trial.find = None  # type: ignore[assignment,method-assign]
        super().__call__()


def test_ranks_agree_on_the_smallest_of_what_they_found(tmp_path: Path):
    """Rank 1 runs out of memory inside a layer, rank 0 does not: nobody waits, both take rank 1's size."""
    both_rich, one_poor = Settling(tmp_path / "rich", [4000, 4000]), Settling(tmp_path / "poor", [4000, 60])
    for settling in (both_rich, one_poor):
        in_ranks(2, settling)
    assert both_rich.found == [192, 1]
    micro, accumulation = one_poor.found
    assert 1 <= micro <= 96
    assert micro * accumulation == 192
    (line,) = one_poor.events(0)
    assert (line["size"], line["world_size"]) == (micro, 2)
    again = SettlingAgain(tmp_path / "poor", [4000, 4000])
    in_ranks(2, again)
    assert again.found == [micro, accumulation]
    assert not again.events(1)


def nothing_fits(settling: Settling) -> None:
    with pytest.raises(EncdecError, match=r"smallest batch must fit in memory.* with 1 sample\."):
        settling()
    dist.barrier()


def test_all_ranks_are_told_where_nothing_fits(tmp_path: Path):
    wide = ("model.from_scratch.intermediate_size=60_000",)
    in_ranks(2, nothing_fits, Settling(tmp_path, [4000, 10], wide, global_batch=2))


@pytest.mark.parametrize(
    "settings",
    [
        ("training.optimizer=muon",),
        ("infra.fsdp_activation_checkpointing=true", "infra.fsdp_sharding_strategy=SHARD_GRAD_OP"),
    ],
    ids=["muon", "checkpointing"],
)
def test_a_try_is_a_step_of_the_run(tmp_path: Path, settings: tuple[str, ...]):
    settling = Settling(tmp_path, [150], settings, global_batch=512)
    in_ranks(1, settling)
    micro, accumulation = settling.found
    assert 1 < micro < 512
    assert micro * accumulation == 512


def test_checkpointing_lets_more_fit(tmp_path: Path):
    """The tries know what the layers keep: all layers' activations, or one's."""
    deep = ("model.from_scratch.num_hidden_layers=12", "model.from_scratch.intermediate_size=256")
    found = []
    for name, checkpointing in (("without", "false"), ("with", "true")):
        settings = (*deep, f"infra.fsdp_activation_checkpointing={checkpointing}")
        settling = Settling(tmp_path / name, [150], settings, global_batch=512)
        in_ranks(1, settling)
        found.append(settling.found[0])
    assert found[0] < found[1], found


# ---- tables


@pytest.mark.parametrize(
    ("number", "found"), [(1, [1]), (12, [12, 6, 4, 3, 2, 1]), (7, [7, 1]), (16, [16, 8, 4, 2, 1])]
)
def test_divisors(number: int, found: list[int]):
    assert list(divisors(number)) == found


PLACE = Place(4, 79)


@pytest.mark.parametrize(
    ("ledgers", "found"),
    [
        ([], None),
        ([[]], None),
        ([[(PLACE, 8)]], 8),
        ([[(PLACE, 8)], [(PLACE, 4)]], 4),  # the newest attempt's
        ([[(PLACE, 8)], [(Place(8, 79), 4)]], 8),  # another number of ranks
        ([[(PLACE, 8)], [(Place(4, 39), 4)]], 8),  # smaller devices
        ([[(Place(4, 39), 4)]], None),
    ],
)
def test_recorded(tmp_path: Path, ledgers: list[list[tuple[Place, int]]], found: int | None):
    paths = RunPaths(tmp_path)
    for lines in ledgers:
        attempt = paths.claim_attempt()
        with JsonLinesWriter(paths.attempt(attempt).events("rank-0")) as ledger:
            ledger.write(event("saved", step=1, size="large"))
        for place, size in lines:
            record(paths, attempt, place, size)
    assert recorded(paths, PLACE) == found


@pytest.mark.parametrize(("share", "largest", "cut"), [(24, "auto", (24, 1)), (24, 7, (6, 4)), (24, 24, (24, 1))])
def test_auto_is_no_bound(share: int, largest: int, cut: tuple[int, int]):
    assert divide_global_batch(2 * share, largest, 2) == cut  # type: ignore[arg-type]


REFUSED = {
    ("training.per_device_train_batch_size=auto", "training.global_batch_size=null"): r"needs training\.global_batch",
    ("training.per_device_train_batch_size=auto", "infra.distributed_type=deepspeed"): r"=auto goes with FSDP2",
    ("training.per_device_train_batch_size=most",): r"training\.per_device_train_batch_size",
    ("training.per_device_train_batch_size=0",): r"training\.per_device_train_batch_size",
}


@pytest.mark.parametrize("settings", REFUSED, ids=" ".join)
def test_refused(settings: tuple[str, ...]):
    with pytest.raises(ConfigError, match=REFUSED[settings]):
        resolve_run(None, config_file=MICRO, settings=settings)


def test_plan_has_the_most_there_can_be(tmp_path: Path):
    run = auto_run(2, 24)
    assert run.micro_batches(2) == (12, 1)
    assert FullConfig.from_mapping(run.config.model_dump(), source="itself") == run.config
    assert settled_micro_batch(TrainingConfig(per_device_train_batch_size=3)) == 3
    with pytest.raises(ConfigError, match="as a number, found auto"):
        settled_micro_batch(run.config.training)


# ---- whole runs


def test_run_with_auto_is_the_run_with_the_number(lab: Lab, twin_digest: str, tmp_path: Path):
    """Here all of a rank's share fits, which is the twin's own number: the same to the last bit, killed or not."""
    process = lab.start_submit(tmp_path / "run", "--per-device-batch", "auto")
    paths = RunPaths(tmp_path / "run")
    wait_for_step(paths, 20)
    kill_everything(paths)
    process.wait()
    code, output = lab.submit(tmp_path / "run", "--per-device-batch", "auto")
    assert code == 0, output
    assert lab.digest(paths.checkpoints / "step-60") == twin_digest
    found = [
        [line["size"] for line in read_json_lines(paths.attempt(n).events("rank-0")) if "micro" in line["event"]]
        for n in paths.attempt_numbers()
    ]
    assert found == [[4], []]


@pytest.mark.parametrize("value", ["0", "many", "-1", "1.5"])
def test_flag_is_a_number_or_auto(value: str):
    with pytest.raises(ConfigError, match="--per-device-batch must be a number of samples or auto"):
        parse_submit(["--phase", "medium", f"--per-device-batch={value}"])


@pytest.mark.parametrize(("value", "size"), [("3", 3), ("auto", "auto")])
def test_flag_lays_over_the_file(value: str, size: object):
    arguments = parse_submit(["--phase", "sanity_check", "--config", str(MICRO), "--per-device-batch", value])
    run = asked_run(arguments, TrainingPhase.SANITY_CHECK, None, None)
    assert run.config.training.per_device_train_batch_size == size
