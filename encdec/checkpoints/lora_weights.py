"""A checkpoint of a model with low-rank adapters, read as one of its parts: merged, the base alone, the adapter alone.

A matrix W with an adapter is three tensors there: ``W.base_layer.weight`` [m, n], ``W.lora_A.default.weight`` [r, n]
and ``W.lora_B.default.weight`` [m, r]. Merged it is ``W.weight`` = base + alpha / r B A.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from encdec.checkpoints.weights import Piece, Weights, box, whole
from encdec.errors import CheckpointError

Part = Literal["merged", "base", "adapter"]
PARTS: tuple[Part, ...] = ("merged", "base", "adapter")
BASE, A, B, ADAPTER = ".base_layer.", ".lora_A.default.", ".lora_B.default.", ".default."
PEFT_PREFIX = "base_model.model."
"""Before each name in peft's own files."""


def read_adapter_config(path: Path) -> dict[str, Any]:
    """peft's ``adapter_config.json``, with what the arithmetic here rests on.

    Raises:
        CheckpointError: it cannot be read, or is of another kind of adapter.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        plain = values["peft_type"] == "LORA" and not values.get("use_rslora") and not values.get("use_dora")
        found = f"{values['peft_type']}, rank {int(values['r'])}, alpha {float(values['lora_alpha'])}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        plain, found, values = False, f"{type(error).__name__}: {error}", {}
    if not plain:
        raise CheckpointError(
            f"{path} must describe plain LoRA, with its rank and alpha", found=found, remedy="Restore it from the run"
        )
    return values


class LoraWeights:
    """One part of ``stored``'s weights, under the names that the part's readers know; a Weights.

    Args:
        config: of the adapter.
    """

    def __init__(self, stored: Weights, config: Mapping[str, Any], part: Part) -> None:
        self._stored, self._part = stored, part
        self._scale = config["lora_alpha"] / config["r"]
        saved = tuple(f"{name}.weight" for name in config["modules_to_save"] or ())
        self._sources = {}
        for name in stored.tensors:
            of_adapter = A in name or B in name
            if part == "adapter" and (of_adapter or name.endswith(saved)):
                self._sources[PEFT_PREFIX + name.replace(ADAPTER, ".")] = name
            elif part != "adapter" and not of_adapter:
                self._sources[name.replace(BASE, ".")] = name
        self.tensors: Mapping[str, Tensor] = {new: stored.tensors[name] for new, name in self._sources.items()}

    def pieces(self, name: str) -> Sequence[Piece]:
        return [whole(self.tensors[name])]

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        source = self._sources[name]
        tensor = self._stored.read(source)
        if self._part == "merged" and BASE in source:
            down, up = (self._stored.read(source.replace(BASE, side)) for side in (A, B))
            tensor = tensor + self._scale * (up @ down)
        return box(tensor, piece)
