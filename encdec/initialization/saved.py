"""The weights of a saved encoder-decoder of ours, as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from encdec.checkpoints.weights import Piece, shape_in, whole
from encdec.errors import ConfigError
from encdec.initialization.source import SourceFiles


class SavedWeights:
    """The tensors of a model's directory under their own names; `encdec.checkpoints.weights.Weights`.

    Args:
        source: the directory's files.
        parameters: of the model, name -> shape.

    Raises:
        ConfigError: names or shapes differ.
    """

    def __init__(self, source: SourceFiles, parameters: Mapping[str, torch.Size]) -> None:
        there = {name: tensor.shape for name, tensor in source.tensors.items()}
        differing = sorted(name for name in {**there, **parameters} if there.get(name) != parameters.get(name))
        if differing:
            name = differing[0]
            raise ConfigError(
                "a model's files must hold exactly the parameters that its config.json describes",
                found=f"{len(differing)} that differ, {name}: {shape_in(there, name)} there, "
                f"{shape_in(parameters, name)} described, in {source.directory}",
                remedy="Export the model again with python -m encdec.checkpoints export RUN DIR, or download it again",
            )
        self.source = source
        self.tensors: Mapping[str, Tensor] = {name: source.tensors[name] for name in parameters}

    def pieces(self, name: str) -> Sequence[Piece]:
        return [whole(self.tensors[name])]

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """A parameter or one box of it, in the type it is stored in.

        Raises:
            MissingPrerequisite: the files cannot be read.
        """
        return self.source.read(name, piece)
