"""Low-rank adapters: they alone are trained, resume exactly, and are exported merged, apart, and as peft loads them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from encdec.adapters import add_adapters
from encdec.checkpoints import __main__ as command
from encdec.checkpoints import logical_digest
from encdec.checkpoints.fsdp2_tensors import DcpTensors
from encdec.checkpoints.model_files import keep_model_files
from encdec.errors import ConfigError, MissingPrerequisite
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.training.build import build_model, empty_twin
from encdec.training.config import FullConfig, ModelConfig
from encdec.training.model_options import LoraConfig
from encdec.training.model_sizes import model_size
from encdec.training.run_config import resolve_run
from tests.conftest import MICRO
from tests.encdec.training.engine_lab import SAVED, Made, Scene
from tests.many_ranks import in_ranks

TWO_LAYERS = "model.from_scratch.num_hidden_layers=2"
LORA = [
    TWO_LAYERS, "model.lora.rank=4", "model.lora.layers=[1]", "model.lora.target_modules=[q_proj,o_proj,down_proj]",
    "model.lora.modules_to_save=[norm]", "model.lora.dropout=0.1", "training.learning_rate=1e-2",
]  # fmt: skip


def config(*settings: str) -> FullConfig:
    return resolve_run(None, config_file=MICRO, settings=list(settings)).config


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 400, (2, 20), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[:, :12], "attention_mask": torch.ones(2, 12, dtype=torch.int64), "labels": ids[:, 12:]}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits


# ---- in a model


def test_at_first_they_change_nothing_and_are_alike_on_every_rank(made: Made):
    before = torch.random.get_rng_state()
    plain, one, other = (build_model(config(*which), made.tokenizer()) for which in ([TWO_LAYERS], LORA, LORA))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(logits(plain), logits(one))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert type(one) is Qwen3ForSeq2SeqLM and one.shared.weight is one.encoder.embed_tokens.weight


def test_what_is_named_is_trained_and_nothing_else(made: Made):
    model = build_model(config(*LORA), made.tokenizer())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert {name.split(".lora_")[0] for name in adapters} == {
        f"{stack}.layers.1.{matrix}"
        for stack in ("encoder", "decoder")
        for matrix in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    }
    assert all(name.endswith("norm.weight") for name in trained - adapters)
    assert trained >= {"encoder.norm.weight", "decoder.layers.0.input_layernorm.weight"}
    twin = empty_twin(build_model(config(TWO_LAYERS), made.tokenizer()), config(*LORA))
    assert {name for name, p in twin.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("extra", [[], ["model.lora.layers=null", "model.lora.modules_to_save=[]"]])
def test_sizes_are_those_of_the_model(made: Made, extra: list[str]):
    settings = config(*LORA, *extra)
    model, size = build_model(settings, made.tokenizer()), model_size(settings.model)
    assert size is not None
    trained = [p for p in model.parameters() if p.requires_grad]
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.trained == sum(p.numel() for p in trained)
    assert size.matrices == sum(p.numel() for p in trained if p.ndim == 2)
    assert size.optimizer_bytes("adamw") == 8 * size.trained
    assert size.checkpoint_bytes("adamw") == 4 * size.parameters + 8 * size.trained


# ---- training


@pytest.fixture(scope="module")
def trained(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Twenty steps on two ranks, saved after ten."""
    settings = [*LORA, f"training.save_steps={SAVED}"]
    scene = Scene(made, "fsdp", tmp_path_factory.mktemp("adapters"), 20, settings=settings)
    in_ranks(2, scene)
    return scene


def test_only_adapters_and_norms_move_and_have_optimizer_state(made: Made, trained: Scene):
    model = build_model(config(*LORA), made.tokenizer())
    stored = DcpTensors(trained.root / "step-20" / "fsdp2")
    with_state = {name.split("optim.")[1].rpartition(".")[0] for name in stored.names if name.startswith("optim.")}
    assert with_state == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        assert torch.equal(stored.read(f"model.{name}"), parameter) is not parameter.requires_grad, name
    assert trained.losses[20] < trained.losses[1] - 0.05


def test_resumption_is_bit_identical(made: Made, trained: Scene, tmp_path: Path):
    scene = Scene(made, "fsdp", tmp_path, 20, trained.root / "step-10", LORA)
    in_ranks(2, scene)
    assert scene.losses == {step: loss for step, loss in trained.losses.items() if step > 10}
    assert logical_digest(tmp_path / "step-20") == logical_digest(trained.root / "step-20")


def test_muon_may_have_all_that_is_trained(made: Made, tmp_path: Path):
    """Adapters of whole layers are matrices: nothing is left for AdamW."""
    scene = Scene(made, "fsdp", tmp_path, 6, settings=["model.lora.rank=2", "training.optimizer=muon"])
    in_ranks(2, scene)
    assert scene.losses[6] < scene.losses[1]


def test_model_with_adapters_saves_the_adapter(made: Made, tmp_path: Path):
    model = build_model(config(*LORA), made.tokenizer())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() and not (tmp_path / "model.safetensors").exists()


# ---- export


@pytest.fixture(scope="module")
def parts(made: Made, trained: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint's three parts, each in a folder of its name."""
    root, tokenizer = tmp_path_factory.mktemp("parts"), made.tokenizer()
    keep_model_files(build_model(config(*LORA), tokenizer), tokenizer, root / "files")
    for part in ("merged", "base", "adapter"):
        words = ["export", str(trained.root / "step-20"), str(root / part), "--files-from", str(root / "files")]
        assert command.main([*words, "--part", part]) == 0
    return root


def test_merged_model_and_adapter_over_its_base_compute_what_was_trained(made: Made, trained: Scene, parts: Path):
    model = build_model(config(*LORA), made.tokenizer())
    stored = DcpTensors(trained.root / "step-20" / "fsdp2")
    model.load_state_dict({name: stored.read(f"model.{name}") for name in model.state_dict()})
    wanted = logits(model)
    merged = AutoModelForSeq2SeqLM.from_pretrained(parts / "merged")
    torch.testing.assert_close(logits(merged), wanted, rtol=1e-5, atol=1e-5)
    assert not any(".lora_" in name or ".base_layer" in name for name in merged.state_dict())
    base = AutoModelForSeq2SeqLM.from_pretrained(parts / "base")
    assert (logits(base) - wanted).abs().max() > 1e-2
    over = peft.PeftModel.from_pretrained(base, parts / "adapter")
    torch.testing.assert_close(logits(over), wanted, rtol=1e-5, atol=1e-5)
    inputs = batch()["input_ids"]
    made_by = [one.generate(input_ids=inputs, max_new_tokens=4) for one in (over, merged)]
    assert torch.equal(*made_by)


def test_adapter_s_folder_holds_the_adapter_alone(parts: Path):
    assert sorted(path.name for path in (parts / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert not (parts / "merged" / "adapter_config.json").exists()
    small, whole = (
        sum(path.stat().st_size for path in (parts / part).glob("*.safetensors")) for part in ("adapter", "merged")
    )
    assert small < whole / 4


def test_part_of_a_model_without_adapters_is_refused(trained: Scene, parts: Path, tmp_path: Path, capsys):
    words = ["export", str(trained.root / "step-20"), str(tmp_path / "out"), "--part", "adapter"]
    assert command.main([*words, "--files-from", str(parts / "merged")]) == 78
    assert "--part adapter needs a run with low-rank adapters" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.lora.rank=0"], r"model\.lora\.rank"),
        (["model.lora.target_modules=[lm_head]"], r"model\.lora\.target_modules"),
        (["model.lora.target_modules=[q_proj,q_proj]"], "each must be named once"),
        (["model.lora.modules_to_save=[shared]"], r"model\.lora\.modules_to_save"),
        (["model.lora.rank=4", "infra.distributed_type=deepspeed"], r"model\.lora.* goes with FSDP2"),
        (["model.n_experts=4", "model.lora.target_modules=[up_proj]"], "must be matrices of attention"),
        (["model.n_experts=4", "model.top_k=5"], "top_k must be at most n_experts, found 5 of 4"),
    ],
)
def test_senseless_options_are_refused_before_anything_starts(settings: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        config(*settings)


def test_what_the_model_does_not_have_is_refused(made: Made, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"model\.lora\.layers .*0 to 0.*found 3"):
        build_model(config("model.lora.layers=[3]"), made.tokenizer())
    experts = build_model(config("model.n_experts=2"), made.tokenizer())
    with pytest.raises(ConfigError, match=r"found up_proj.*k_proj, o_proj"):
        add_adapters(experts, LoraConfig(target_modules=["q_proj", "up_proj"]), 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPrerequisite, match=r"needs peft.*pip install \"peft"):
        add_adapters(experts, LoraConfig(), 0)


def test_defaults_train_attention_s_matrices():
    settings = ModelConfig(lora=LoraConfig())
    assert settings.lora is not None and settings.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    size = model_size(settings)
    assert size is not None and 0.001 < size.trained / size.parameters < 0.02
