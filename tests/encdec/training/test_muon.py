"""Muon: torch's own steps on plain and sharded matrices, the same losses at any number of ranks, exact resumption."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from encdec.checkpoints import logical_digest
from encdec.checkpoints.fsdp2_tensors import DcpTensors
from encdec.errors import CheckpointError, ConfigError
from encdec.estimates import LayerWidths, ModelSize
from encdec.training.config import FullConfig
from encdec.training.muon import Muon, MuonWithAdamW, orthogonalized, torch_step
from encdec.training.optimizer import make_optimizer, require_own_state
from encdec.training.run_config import resolve_run
from encdec.training.schedule import Schedule
from tests.conftest import MICRO
from tests.encdec.training.engine_lab import Made, Scene, farthest
from tests.many_ranks import in_ranks

SHAPES = [(6, 4), (4, 6), (5, 5), (1, 3), (7, 2), (6, 4), (3, 8)]
"""Rows that no number of ranks divides, and fewer rows than ranks."""
STEPS = 5
MUON = ["training.optimizer=muon", "training.learning_rate=1e-3"]


class Layered(nn.Module):
    """Some matrices in a layer, and what Muon must not step around them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in SHAPES])
        self.layer.append(nn.Parameter(torch.randn(4)))
        self.embedding = nn.Parameter(torch.randn(10, 4))
        self.norm = nn.Parameter(torch.randn(4))

    def transformer_layers(self) -> list[nn.Module]:
        return [self.layer]


def give_gradients(model: nn.Module, step: int) -> None:
    """The same whole gradients on every rank, cut as the parameters are."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        whole = torch.randn(parameter.shape, generator=generator)
        if isinstance(parameter, DTensor):
            parameter.grad = dist.tensor.distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        else:
            parameter.grad = whole


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    for step in range(STEPS):
        give_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def config() -> FullConfig:
    made = FullConfig()
    made.training.optimizer, made.training.learning_rate, made.training.weight_decay = "muon", 1e-2, 0.1
    return made


def test_steps_are_torchs():
    """torch.optim.Muon and torch.optim.AdamW, each for its parameters, by hand."""
    ours, theirs = Layered(), Layered()
    optimizer = make_optimizer(ours, config())
    matrices = [p for p in theirs.layer if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": [theirs.embedding], "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )
    expected = []
    for step in range(STEPS):
        give_gradients(theirs, step)
        muon.step()
        adamw.step()
    expected = [p.detach() for p in theirs.parameters()]
    for found, wanted in zip(trained(ours, optimizer), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_step_has_the_size_of_adamws():
    """Root mean square of 0.2 to 0.4, AdamW's usual, for any shape (Liu et al. 2025, section 2.2)."""
    torch.manual_seed(0)
    for shape in [(64, 64), (32, 128), (128, 32)]:
        assert torch_step(torch.randn(shape)).square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def compare_sharded(folder: Path) -> None:
    model = Layered()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = make_optimizer(model, config())
    found = trained(model, optimizer)
    assert all(isinstance(state, DTensor) for p in model.layer for state in optimizer.state[p].values() if state.ndim)
    for one, wanted in zip(found, torch.load(folder / "whole.pt"), strict=True):
        assert torch.equal(one, wanted)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_sharded_matrices_take_the_same_steps_to_the_last_bit(tmp_path: Path, ranks: int):
    model = Layered()
    torch.save(trained(model, make_optimizer(model, config())), tmp_path / "whole.pt")
    in_ranks(ranks, compare_sharded, tmp_path)


def torchs_own_on_shards() -> None:
    """Why the matrices travel: should this fail one day, torch's Muon could take DTensors as they are."""
    torch.manual_seed(0)
    whole = torch.randn(32, 16)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    steps = []
    for tensor in (whole, dist.tensor.distribute_tensor(whole, mesh, [dist.tensor.Shard(0)])):
        parameter = nn.Parameter(torch.zeros_like(tensor))
        parameter.grad = tensor
        torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
        steps.append(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach())
    assert (steps[0] - steps[1]).abs().max() > 1e-3
    sharded = dist.tensor.distribute_tensor(whole, mesh, [dist.tensor.Shard(0)])
    (part,) = orthogonalized([sharded.to_local()], [sharded])
    assert torch.equal(part, torch_step(whole).chunk(dist.get_world_size())[dist.get_rank()])


def test_torchs_muon_on_shards_is_not_that_of_the_whole():
    in_ranks(2, torchs_own_on_shards)


# ---- training


@pytest.fixture(scope="module")
def four_ranks(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Twenty steps by Muon, saved after ten."""
    scene = Scene(made, "fsdp", tmp_path_factory.mktemp("muon"), 20, settings=[*MUON, "training.save_steps=10"])
    in_ranks(4, scene)
    return scene


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_do_not_depend_on_the_ranks(made: Made, four_ranks: Scene, tmp_path: Path, ranks: int):
    scene = Scene(made, "fsdp", tmp_path, 10, settings=MUON)
    in_ranks(ranks, scene)
    assert farthest(scene, four_ranks) < 1e-5
    assert four_ranks.losses[20] < four_ranks.losses[1] - 0.1  # they do learn something


def test_resumption_is_bit_identical(made: Made, four_ranks: Scene, tmp_path: Path):
    scene = Scene(made, "fsdp", tmp_path, 20, four_ranks.root / "step-10", settings=MUON)
    in_ranks(4, scene)
    assert scene.losses == {step: loss for step, loss in four_ranks.losses.items() if step > 10}
    for step in (10, 20):
        assert logical_digest(tmp_path / f"step-{step}") == logical_digest(four_ranks.root / f"step-{step}")


def test_checkpoint_goes_on_at_another_number_of_ranks(made: Made, four_ranks: Scene, tmp_path: Path):
    scene = Scene(made, "fsdp", tmp_path, 20, four_ranks.root / "step-10", settings=MUON)
    in_ranks(2, scene)
    assert logical_digest(tmp_path / "step-10") == logical_digest(four_ranks.root / "step-10")
    assert farthest(scene, four_ranks) < 1e-5


def test_checkpoint_holds_momentum_for_the_layers_and_adamws_moments_for_the_rest(four_ranks: Scene):
    stored = DcpTensors(four_ranks.root / "step-10" / "fsdp2")
    of = {
        name: {n.rpartition(".")[2] for n in stored.names if n.startswith(f"optim.{name}.")}
        for name in stored.parameters
    }
    for name, shape in stored.parameters.items():
        by_muon = ".layers." in name and len(shape) == 2
        assert of[name] == ({"momentum_buffer"} if by_muon else {"step", "exp_avg", "exp_avg_sq"}), name
    parameters = {name: shape.numel() for name, shape in stored.parameters.items()}
    size = ModelSize(
        parameters=sum(parameters.values()), vocabulary=0, embedding=0, widths=LayerWidths.like_qwen3(1), layers=1,
        matrices=sum(parameters[name] for name in parameters if of[name] == {"momentum_buffer"}),
    )  # fmt: skip
    whole = sum(meta.numel() for meta in stored.tensors.values() if meta.ndim)
    assert size.checkpoint_bytes("muon") == 4 * whole


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_of_the_other_optimizer_is_refused(optimizer: str):
    settings, other = config(), config()
    settings.training.optimizer = optimizer  # type: ignore[assignment]
    other.training.optimizer = "muon" if optimizer == "adamw" else "adamw"
    model = Layered()
    own, foreign = make_optimizer(model, settings), make_optimizer(model, other)
    for each in (own, foreign):
        give_gradients(model, 0)
        each.step()
    require_own_state(own)
    own.state = foreign.state
    with pytest.raises(CheckpointError, match=r"training\.optimizer"):
        require_own_state(own)


def go_on_under_zero3(scene: Scene) -> None:
    with pytest.raises(CheckpointError, match=r"found .*momentum_buffer.*training\.optimizer"):
        scene.trainer().load_checkpoint(scene.start)


def test_zero3_does_not_go_on_from_muons_state(made: Made, four_ranks: Scene, tmp_path: Path):
    in_ranks(1, go_on_under_zero3, Scene(made, "deepspeed", tmp_path, 20, four_ranks.root / "step-10"))


def test_one_schedule_one_state_dict():
    """To the schedule and to torch's own state_dict it is one optimizer."""
    model, twin = Layered(), Layered()
    optimizer, other = make_optimizer(model, config()), make_optimizer(twin, config())
    assert isinstance(optimizer, MuonWithAdamW)
    schedule = Schedule(peak=1.0, warmup_steps=4, total_steps=8, min_ratio=0.1, shape="cosine")
    assert schedule.apply(optimizer) == 0.25
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    trained(model, optimizer)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, wanted in zip(trained(twin, other), trained(model, optimizer), strict=True):
        assert torch.equal(one, wanted)


def test_no_matrix_no_muon():
    plain = nn.Module()
    plain.weight = nn.Parameter(torch.ones(3))
    plain.transformer_layers = lambda: []  # type: ignore[assignment]
    assert isinstance(make_optimizer(plain, config()), torch.optim.AdamW)
    assert Muon([nn.Parameter(torch.ones(2, 2))], 1.0, weight_decay=0.0).step() is None  # no gradient, no step


def test_refused_with_zero3():
    with pytest.raises(ConfigError, match=r"training\.optimizer=muon goes with FSDP2.*--sharding fsdp2"):
        resolve_run(None, config_file=MICRO, settings=[*MUON, "infra.distributed_type=deepspeed"])
