from __future__ import annotations

from pathlib import Path

import pytest
import torch

from encdec.checkpoints import CheckpointManager
from encdec.checkpoints.model_files import keep_model_files
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.files import RunPaths
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.tokenization_qwen3_encdec import Qwen3EncoderDecoderTokenizer
from encdec.weight_initialization import build_from_scratch
from tests.encdec.checkpoints.damage import Lab


@pytest.fixture
def saved(tmp_path: Path) -> tuple[CheckpointManager, Lab]:
    """Checkpoints of steps 1, 2 and 3."""
    manager, lab = CheckpointManager(tmp_path / "checkpoints"), Lab()
    for _ in range(3):
        lab.step()
        lab.save(manager)
    return manager, lab


def load_model(run: RunPaths, step: int) -> Qwen3ForSeq2SeqLM:
    """The model of a run's checkpoint, unsharded, through the manager that training uses."""
    model = build_from_scratch(Qwen3EncoderDecoderConfig.from_pretrained(run.model), seed=0)
    lab = Lab()
    optimizer = torch.optim.AdamW(model.parameters())
    CheckpointManager(run.checkpoints).load(run.checkpoints / f"step-{step}", model, optimizer, lab.schedule)
    return model.eval()


@pytest.fixture(scope="module")
def large_run(twin: RunPaths, tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """Five checkpoints of a 13 M parameter model, 51 MB each, no optimizer state; beside it a run of small ones."""
    paths = RunPaths(tmp_path_factory.mktemp("large") / "run")
    tokenizer = Qwen3EncoderDecoderTokenizer.from_pretrained(twin.model)
    config = Qwen3EncoderDecoderConfig.from_pretrained(twin.model)
    for name, value in {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}.items():
        setattr(config, name, value)
    config.num_encoder_layers, config.layer_types = 4, ["full_attention"] * 4
    model = build_from_scratch(config, seed=3)
    keep_model_files(model, tokenizer, paths.model)
    manager, lab = CheckpointManager(paths.checkpoints, save_total_limit=5), Lab()
    optimizer = torch.optim.SGD(model.parameters())
    for step in range(1, 6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0 + 0.1 * step)
        manager.save(model, optimizer, lab.schedule, step)
    small = CheckpointManager(paths.root.parent / "small" / "checkpoints")
    for _ in range(2):
        lab.step()
        lab.save(small)
    return paths
