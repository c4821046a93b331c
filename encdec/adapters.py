"""Low-rank adapters (LoRA) in a model, by peft."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from encdec.checkpoints.weights import box
from encdec.errors import ConfigError
from encdec.initialization.streams import InitialWeights, Stream
from encdec.training.model_options import LoraConfig
from encdec.training.rules import require_peft

ADAPTER = "default"
"""peft's name of the one adapter that a model has here."""


def add_adapters(model: Any, lora: LoraConfig, seed: int, base: str | None = None) -> dict[str, Tensor]:
    """Put adapters into ``model``, in place, and freeze all else but ``modules_to_save``.

    At first they change nothing: B is zero. A matrix ``W`` is then ``W.base_layer``, beside it ``lora_A`` and
    ``lora_B``. The same on every rank; torch's global generator is untouched.

    Args:
        model: on the host or the meta device, not sharded; its class and what it computes stay.
        base: where the model's own weights come from, for the adapter's configuration.

    Returns:
        Name -> what each adapter's parameter begins with. Those of a model on the meta device are there, too.

    Raises:
        MissingPrerequisite: peft is not installed.
        ConfigError: a layer or a matrix that the model does not have.
    """
    require_peft()
    import peft

    layers = max(model.config.num_hidden_layers, model.config.num_encoder_layers)
    if lora.layers is not None and max(lora.layers) >= layers:
        raise ConfigError(
            f"model.lora.layers must be layers that the model has, 0 to {layers - 1}",
            found=max(lora.layers),
            remedy="Leave it out for all of them",
        )
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout, target_modules=list(lora.target_modules),
        layers_to_transform=lora.layers, layers_pattern=None if lora.layers is None else "layers", bias="none",
        task_type=peft.TaskType.SEQ_2_SEQ_LM, base_model_name_or_path=base,
    )  # fmt: skip
    _require_targets(model, lora)
    with torch.random.fork_rng(devices=[]):
        peft.inject_adapter_in_model(config, model, ADAPTER)
    config.modules_to_save = list(lora.modules_to_save) or None  # ours are trained in place, without peft's wrappers
    config.inference_mode = True  # as peft saves it
    for name, module in model.named_modules():
        if name.endswith(tuple(lora.modules_to_save)):
            module.requires_grad_(True)
    model._hf_peft_config_loaded = True  # transformers then saves the adapter, and not a model of its names
    adapters = {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
    values = first_values(adapters, seed)
    for name, parameter in adapters.items():
        if not parameter.is_meta:
            parameter.data.copy_(values[name])
    return values


def first_values(adapters: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Name -> values, float32 on the host, as peft draws them: A uniform (Kaiming's, with a = sqrt(5)), B zero. peft
    itself draws none for a model on the meta device.
    """
    generator, values = torch.Generator().manual_seed(seed), {}
    for name, parameter in adapters.items():
        values[name] = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(values[name], a=math.sqrt(5), generator=generator)
    return values


class AdaptedWeights:
    """What a model with adapters begins with: its own weights, and those of the adapters.

    Args:
        own: of the model without adapters.
        names: of the parameters of the model with them.
        adapters: name -> value.
    """

    def __init__(self, own: InitialWeights, names: Iterable[str], adapters: Mapping[str, Tensor]) -> None:
        self._own, self._names, self._adapters = own, frozenset(names), adapters

    def stream(self) -> Stream:
        for name, read in self._own.stream():
            place, _, own_name = name.rpartition(".")
            wrapped = f"{place}.base_layer.{own_name}"
            yield wrapped if wrapped in self._names else name, read
        for name, value in self._adapters.items():
            yield name, functools.partial(box, value)


def _require_targets(model: nn.Module, lora: LoraConfig) -> None:
    there = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if missing := [name for name in lora.target_modules if name not in there]:
        raise ConfigError(
            "model.lora.target_modules must be matrices that the model has; those of experts are none",
            found=", ".join(missing),
            remedy=f"Use some of {', '.join(sorted(there))}",
        )
