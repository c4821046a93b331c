"""The model without its weights: configuration, generation configuration, tokenizer, code, as Hugging Face names them.

A run keeps them beside its checkpoints, so that a checkpoint can be exported wherever the run directory is, without the
corpus, the hub or the packed text that they once came from.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from encdec.checkpoints.training_facts import TrainingFacts
from encdec.files import RunPaths, staged_directory

MODEL_FOLDER = "model"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
"""peft's, of a model with low-rank adapters."""


def keep_model_files(model: Any, tokenizer: Any, folder: Path, facts: TrainingFacts | None = None) -> None:
    """Write ``folder`` if it is not there.

    Args:
        model: a transformers model, not yet sharded.
        tokenizer: the one that belongs to it.
        facts: how it is going to be trained, for its card.

    Raises:
        OSError: it cannot be written.
    """
    if folder.exists():
        return
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    try:
        with staged_directory(folder) as staging:
            config.save_pretrained(staging)  # and the code
            model.generation_config.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            if facts:
                facts.write(staging)
            for adapter in getattr(model, "peft_config", {}).values():
                adapter.save_pretrained(staging)
    except FileExistsError:
        return  # a rank of a start that was cut off has written it meanwhile


def find_model_files(checkpoint: Path) -> Path | None:
    """The folder of model files that belongs to a checkpoint: its own, or that of the run directory it lies in."""
    candidates = (checkpoint / MODEL_FOLDER, RunPaths(checkpoint.absolute().parent.parent).model)
    return next((folder for folder in candidates if (folder / CONFIG).is_file()), None)
