"""FSDP2 at two and four ranks computes what one process computes with a plain model; the embedding stays one."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed.tensor import DTensor

from tests.encdec.training.engine_lab import Made, Scene
from tests.many_ranks import in_ranks

STEPS = 4
KINDS = {
    "dense": [],
    "experts": ["model.n_experts=3", "model.router_aux_loss_coef=0.05"],
    "adapters": ["model.lora.rank=4", "model.lora.modules_to_save=[norm]"],
}
CHECKPOINTING = "infra.fsdp_activation_checkpointing=true"


@pytest.fixture(scope="module", params=KINDS)
def alone(request: pytest.FixtureRequest, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Several micro-batches a step, in this process."""
    root = tmp_path_factory.mktemp("alone")
    scene = Scene(made, "plain", root, STEPS, settings=[CHECKPOINTING, *KINDS[request.param]])
    scene()
    return scene


def train_and_look_at_the_embedding(scene: Scene) -> None:
    scene()
    trainer = scene.trainer()
    trainer.load_checkpoint(scene.root / f"step-{STEPS}")
    model = trainer.engine.module
    places = (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens)
    assert all(isinstance(place.weight, DTensor) for place in places)
    assert len({place.weight.to_local().untyped_storage().data_ptr() for place in places}) == 1
    assert sum(name.endswith(("shared.weight", "embed_tokens.weight")) for name, _ in model.named_parameters()) == 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_sharded_training_is_that_of_one_process(made: Made, alone: Scene, tmp_path: Path, ranks: int):
    scene = Scene(made, "fsdp", tmp_path, STEPS, settings=alone.settings)
    in_ranks(ranks, train_and_look_at_the_embedding, scene)
    for name in ("loss", "grad_norm"):
        found, wanted = scene.recorded(name), alone.recorded(name)
        assert list(found) == list(range(1, STEPS + 1))
        assert max(abs(found[step] - wanted[step]) for step in found) < 1e-5, name
