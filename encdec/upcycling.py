"""Experts in place of a model's feed-forwards: what a mixture of experts starts from where there is a dense model.

"Sparse upcycling", Komatsuzaki et al. 2023 (arXiv:2212.05055): every expert begins as a copy of the dense feed-forward,
and the router is drawn small. What the model computes stays, for the weights of a token's experts add up to 1
(`norm_topk_prob`); the routers' noise is what tells the experts apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from blake3 import blake3
from torch import Tensor

from encdec.checkpoints.weights import Piece, Weights, box, whole
from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError
from encdec.initialization.streams import StoredStream
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.training.config import ModelConfig
from encdec.weight_initialization import UnfilledModel, allocate

ROUTER_STD = 0.01
"""Of the routers of a model that was dense: half of Qwen3's ``initializer_range``, so that all experts are tried."""
ROUTER, GATE_AND_UP, DOWN = "gate.weight", "experts.gate_up_proj", "experts.down_proj"


def plan_experts(plan: UnfilledModel, settings: ModelConfig, seed: int) -> UnfilledModel:
    """``plan`` with ``settings.n_experts`` copies of each feed-forward and new routers.

    Args:
        plan: of a model that can be read in any order: a saved one, or one that starts from Qwen3. Also one that has
            experts already, as many as asked for, which is returned.

    Raises:
        ConfigError: the model has another number of experts, or passes a token through others; or only one expert is
            to see a token.
    """
    model = experts_model(plan.model, settings)
    if model is plan.model:
        return plan
    assert isinstance(plan.weights, StoredStream)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return UnfilledModel(model, StoredStream(UpcycledWeights(plan.weights.weights, shapes, seed)))


def experts_model(dense: Qwen3ForSeq2SeqLM, settings: ModelConfig) -> Qwen3ForSeq2SeqLM:
    """The same for the model alone, its parameters on the meta device."""
    there = dense.config.num_experts
    if there is not None:
        if there != settings.n_experts:
            raise ConfigError(
                "model.n_experts must be that of the encoder-decoder in model.model_name_or_path",
                found=f"{settings.n_experts}, and {there} there",
                remedy="Leave n_experts out: it is read from there",
            )
        if settings.top_k != dense.config.num_experts_per_tok:
            raise ConfigError(
                "model.top_k must be that of the encoder-decoder in model.model_name_or_path",
                found=f"{settings.top_k}, and {dense.config.num_experts_per_tok} there",
                remedy="Set it to that, or leave n_experts out: then both are read from there",
            )
        dense.config.router_aux_loss_coef = settings.router_aux_loss_coef
        return dense
    if settings.top_k == 1:
        raise ConfigError(
            "model.top_k must be 2 or more where experts start from a dense model: the one expert's weight, about "
            "1 / n_experts, would scale every feed-forward",
            found=settings.top_k,
            remedy="Set it to 2, or start from model.from_scratch",
        )
    config = Qwen3EncoderDecoderConfig(**(_kept(dense.config) | expert_fields(settings)))
    model = allocate(config, dense.dtype, meta=True)
    model.generation_config = dense.generation_config
    return model


class UpcycledWeights:
    """The parameters of a mixture of experts, read from a dense model; `encdec.checkpoints.weights.Weights`.

    Args:
        dense: of a model like it but for the experts.
        shapes: of the parameters, by name.
        seed: of the routers.
    """

    def __init__(self, dense: Weights, shapes: Mapping[str, torch.Size], seed: int) -> None:
        self._dense, self._seed = dense, seed
        kinds = {name: torch.float32 if _kind(name) else dense.tensors[name].dtype for name in shapes}
        self.tensors: Mapping[str, Tensor] = {
            name: torch.empty(shape, dtype=kinds[name], device="meta") for name, shape in shapes.items()
        }

    def pieces(self, name: str) -> Sequence[Piece]:
        return [whole(self.tensors[name])]

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """A parameter or one box of it: experts and routers in float32, others in the dense model's type."""
        block, kind = name.rpartition(".mlp.")[0], _kind(name)
        if kind is None:
            return self._dense.read(name, piece)
        piece = piece or whole(self.tensors[name])
        if kind == ROUTER:
            return box(self._router(name), piece)
        inner = Piece(piece.offsets[1:], piece.sizes[1:])  # of one expert; they are alike
        if kind == DOWN:
            one = self._dense.read(f"{block}.mlp.down_proj.weight", inner)
        else:
            one = self._rows([f"{block}.mlp.{part}.weight" for part in ("gate_proj", "up_proj")], inner)
        return one.float().expand(piece.sizes)

    def _rows(self, names: Sequence[str], piece: Piece) -> Tensor:
        """A box of matrices that stand one above the other."""
        first, (row, column), (rows, columns) = 0, piece.offsets, piece.sizes
        parts = []
        for name in names:
            height = self._dense.tensors[name].shape[0]
            begin, end = max(row - first, 0), min(row + rows - first, height)
            if begin < end:
                parts.append(self._dense.read(name, Piece((begin, column), (end - begin, columns))))
            first += height
        return torch.cat(parts)

    def _router(self, name: str) -> Tensor:
        """Drawn from the seed and the name alone, so in any order."""
        digest = blake3(f"{self._seed} {name}".encode()).digest(7)
        generator = torch.Generator().manual_seed(int.from_bytes(digest))
        return torch.empty(self.tensors[name].shape).normal_(0.0, ROUTER_STD, generator=generator)


def _kind(name: str) -> str | None:
    _, block, kind = name.rpartition(".mlp.")
    return kind if block and kind in (ROUTER, GATE_AND_UP, DOWN) else None


def expert_fields(settings: ModelConfig) -> dict[str, object]:
    """What a model's configuration says of experts, as ``settings`` ask for; nothing where they ask for none."""
    if settings.n_experts is None:
        return {}
    return {
        "num_experts": settings.n_experts,
        "num_experts_per_tok": settings.top_k,
        "router_aux_loss_coef": settings.router_aux_loss_coef,
    }


def _kept(config: Qwen3EncoderDecoderConfig) -> dict[str, object]:
    """Its fields, without those that say how a folder was written."""
    apart = {"model_type", "transformers_version", "architectures", "num_experts", "norm_topk_prob"}
    return {name: value for name, value in config.to_dict().items() if name not in apart}
