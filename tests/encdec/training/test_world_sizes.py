"""Four ranks' checkpoint goes on at any number of ranks, under either engine, as if nothing had changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from encdec.checkpoints import logical_digest
from encdec.checkpoints.manifest import read_manifest
from encdec.checkpoints.partitions import Partitions
from encdec.checkpoints.payload import payload_named
from tests.encdec.training.engine_lab import END, SAVED, Made, Scene, farthest
from tests.many_ranks import in_ranks

ENGINES = ["fsdp", "deepspeed"]


def test_engines_compute_the_same(whole_run: Callable[[str], Scene]):
    one, other = map(whole_run, ENGINES)
    assert farthest(one, other) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_checkpoint_of_four_ranks_goes_on_at_any_number(
    made: Made, whole_run: Callable[[str], Scene], tmp_path: Path, engine: str, ranks: int
):
    """The same digest when it is saved again at once, and the next 20 losses; at four, everything to the last bit."""
    whole = whole_run(engine)
    saved, again = (scene / f"step-{SAVED}" for scene in (whole.root, tmp_path))
    scene = Scene(made, engine, tmp_path, END, saved)
    in_ranks(ranks, scene)
    assert logical_digest(again) == logical_digest(saved)
    assert read_manifest(again).world_size == ranks
    assert farthest(scene, whole) < 1e-5
    if ranks == 4:
        assert scene.losses == {step: loss for step, loss in whole.losses.items() if step > SAVED}
        assert logical_digest(tmp_path / f"step-{END}") == logical_digest(whole.root / f"step-{END}")
    if ranks == 3 and engine == "deepspeed":
        require_zero_padding(Partitions(again / "zero3"))


def require_zero_padding(stored: Partitions) -> None:
    """Memory as it was found belongs in no checkpoint."""
    padded = [place for place in stored.places.values() if place.numel % stored.world_size]
    assert padded
    for place in padded:
        for rank in range(stored.world_size):
            part = stored.shard(rank).weights[place.group][place.offset :][: place.length]
            assert not part[place.held_by(rank) :].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_embedding_has_one_storage_from_start_to_resume(
    whole_run: Callable[[str], Scene], made: Made, tmp_path: Path, engine: str
):
    saved = whole_run(engine).root / f"step-{SAVED}"
    in_ranks(2, stay_tied, Scene(made, engine, tmp_path, SAVED + 1, saved))


def stay_tied(scene: Scene) -> None:
    trainer = scene.trainer()
    model = getattr(trainer.engine.module, "module", trainer.engine.module)
    require_one_storage(model)
    assert scene.start is not None
    trainer.load_checkpoint(scene.start)
    require_one_storage(model)
    trainer._step()
    require_one_storage(model)
    payload = payload_named(trainer.engine.payload)
    stored = payload.stored(scene.start / payload.name).names
    assert [name for name in stored if "embed" in name] == []
    assert stored.count("model.shared.weight") == 1


def require_one_storage(model: Any) -> None:
    """Shared, encoder and decoder have one parameter, and this rank one part of it in memory."""
    weights = [module.weight for module in (model.shared, model.encoder.embed_tokens, model.decoder.embed_tokens)]
    assert all(weight is weights[0] for weight in weights)
    parts = [getattr(weight, "ds_tensor", None) for weight in weights]
    parts = [weight.to_local() if part is None else part for weight, part in zip(weights, parts, strict=True)]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1 and parts[0].numel()
    assert [name for name, _ in model.named_parameters(remove_duplicate=False) if "embed" in name] == []
