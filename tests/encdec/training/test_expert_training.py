"""Experts in training: the same at any number of ranks and under either engine, exact resumption, Muon, export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForSeq2SeqLM

from encdec.checkpoints import logical_digest
from encdec.checkpoints.export import export
from encdec.checkpoints.fsdp2_tensors import DcpTensors
from encdec.checkpoints.manifest import verify
from encdec.checkpoints.model_files import keep_model_files
from encdec.training.build import build_model, empty_model
from encdec.training.engines.fsdp2 import placement
from encdec.training.model_sizes import model_size
from encdec.training.muon import orthogonalized_stack, torch_step
from encdec.training.run_config import resolve_run
from tests.conftest import MICRO
from tests.encdec.training.engine_lab import SAVED, Made, Scene, farthest
from tests.many_ranks import in_ranks

EXPERTS = ["model.n_experts=3", "model.router_aux_loss_coef=0.05", "infra.fsdp_activation_checkpointing=true"]
MUON = ["training.optimizer=muon"]


@pytest.fixture(scope="module")
def two_ranks(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Twenty steps, saved after ten; three experts are cut through on two ranks."""
    settings = [*EXPERTS, f"training.save_steps={SAVED}"]
    scene = Scene(made, "fsdp", tmp_path_factory.mktemp("experts"), 20, settings=settings)
    in_ranks(2, scene)
    return scene


def test_step_records_hold_both_losses(two_ranks: Scene):
    assert two_ranks.losses[20] < two_ranks.losses[1] - 0.1  # cross-entropy alone, and it falls
    assert all(0.9 < aux < 3 for aux in two_ranks.recorded("aux_loss").values())


def test_resumption_is_bit_identical(made: Made, two_ranks: Scene, tmp_path: Path):
    scene = Scene(made, "fsdp", tmp_path, 20, two_ranks.root / "step-10", EXPERTS)
    in_ranks(2, scene)
    for name in ("loss", "aux_loss", "grad_norm"):
        wanted = {step: value for step, value in two_ranks.recorded(name).items() if step > 10}
        assert scene.recorded(name) == wanted
    for step in (10, 20):
        assert logical_digest(tmp_path / f"step-{step}") == logical_digest(two_ranks.root / f"step-{step}")


def test_either_engine_goes_on_from_the_other_s_checkpoint(made: Made, two_ranks: Scene, tmp_path: Path):
    """And at another number of ranks, which cuts the experts otherwise."""
    there = Scene(made, "deepspeed", tmp_path / "there", 14, two_ranks.root / "step-10", EXPERTS)
    in_ranks(2, there)
    back = Scene(made, "fsdp", tmp_path / "back", 14, there.root / "step-10", EXPERTS)
    in_ranks(3, back)
    assert logical_digest(back.root / "step-10") == logical_digest(two_ranks.root / "step-10")
    for scene in (there, back):
        assert farthest(scene, two_ranks) < 1e-5
        aux = scene.recorded("aux_loss")
        assert max(abs(value - two_ranks.recorded("aux_loss")[step]) for step, value in aux.items()) < 1e-5


def test_exported_model_generates(made: Made, two_ranks: Scene, tmp_path: Path):
    config = micro_config()
    tokenizer = made.tokenizer()
    keep_model_files(build_model(config, tokenizer), tokenizer, tmp_path / "files")
    checkpoint = two_ranks.root / "step-20"
    export(checkpoint, verify(checkpoint), tmp_path / "hf", files_from=tmp_path / "files")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf")
    stored = DcpTensors(checkpoint / "fsdp2")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored.read(f"model.{name}")), name
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4).shape[1] > 1


def micro_config():
    return resolve_run(None, config_file=MICRO, settings=EXPERTS).config


def test_dense_folder_is_where_experts_and_adapters_start_from(made: Made, tmp_path: Path):
    """What the configuration says, through build_model, to the model and to the adapter's own configuration."""
    tokenizer = made.tokenizer()
    dense = build_model(resolve_run(None, config_file=MICRO).config, tokenizer)
    dense.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    start = ["model.from_scratch=null", f"model.model_name_or_path={tmp_path}", "model.train_tokenizer_vocab_size=null"]
    config = resolve_run(None, config_file=MICRO, settings=[*start, *EXPERTS]).config
    experts, empty = build_model(config, tokenizer).eval(), empty_model(config, tokenizer)
    dense.eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    found, wanted = (model(input_ids=ids, labels=ids) for model in (experts, dense))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
    assert experts.config.router_aux_loss_coef == 0.05
    assert {n: p.shape for n, p in empty.named_parameters()} == {n: p.shape for n, p in experts.named_parameters()}
    settings = resolve_run(None, config_file=MICRO, settings=[*start, *EXPERTS, "model.lora.rank=2"]).config
    adapted, size = build_model(settings, tokenizer), model_size(settings.model)
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path)
    assert size is not None and size.parameters == sum(p.numel() for p in adapted.parameters())
    assert size.inactive == sum(p.numel() for p in adapted.parameters() if p.ndim == 3) // 3


# ---- sharding and Muon


def test_experts_are_cut_where_ranks_divide_them_else_through_each():
    stack, matrix = torch.nn.Parameter(torch.empty(8, 96, 32)), torch.nn.Parameter(torch.empty(96, 32))
    found = {ranks: placement(stack, ranks).dim for ranks in (1, 2, 3, 5, 8, 16, 64)}
    assert found == {1: 0, 2: 0, 3: 1, 5: 0, 8: 0, 16: 1, 64: 0}  # 64 divide neither 8 nor 96
    assert placement(matrix, 64) == Shard(0)


class Stacked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stack = torch.nn.Parameter(torch.randn(3, 8, 6))


def step_stacks() -> None:
    whole = Stacked().stack.detach()
    ranks = dist.get_world_size()
    blocks = [matrix for expert in whole for matrix in expert.chunk(2)]
    expected = torch.stack([torch_step(block) for block in blocks]).view_as(whole)
    for cut in (Shard(0), Shard(1)):
        model = Stacked()
        mesh = init_device_mesh("cpu", (ranks,))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda parameter, cut=cut: cut)
        assert isinstance(model.stack, DTensor)
        step = orthogonalized_stack(model.stack.to_local().detach(), model.stack, 2)
        found = DTensor.from_local(step, mesh, [cut], shape=whole.shape, stride=whole.stride()).full_tensor()
        assert torch.equal(found, expected), cut


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_muon_steps_each_expert_s_gate_and_up_alone_to_the_last_bit(ranks: int):
    in_ranks(ranks, step_stacks)


def test_muon_trains_experts_alike_at_any_number_of_ranks(made: Made, tmp_path: Path):
    alone = Scene(made, "plain", tmp_path / "alone", 5, settings=[*EXPERTS, *MUON])
    alone()
    sharded = Scene(made, "fsdp", tmp_path / "sharded", 5, settings=[*EXPERTS, *MUON])
    in_ranks(2, sharded)
    assert farthest(sharded, alone) < 1e-5
    stored = DcpTensors(sharded.root / "step-5" / "fsdp2")
    kinds = {name.rpartition(".")[2] for name in stored.names if ".experts." in name and name.startswith("optim.")}
    assert kinds == {"momentum_buffer"}
