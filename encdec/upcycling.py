"""Experts in place of a model's feed-forwards: what a mixture of experts starts from where there is a dense model."""

from __future__ import annotations

import torch

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError
from encdec.mixture_of_experts import fill_from_dense
from encdec.modeling_qwen3_encdec import Qwen3ForSeq2SeqLM
from encdec.training.config import ModelConfig
from encdec.weight_initialization import allocate

ROUTER_STD = 0.01
"""Of the routers of a model that was dense: half of Qwen3's ``initializer_range``, so that all experts are tried."""


def with_experts(dense: Qwen3ForSeq2SeqLM, settings: ModelConfig, seed: int, *, fill: bool) -> Qwen3ForSeq2SeqLM:
    """``dense`` with ``settings.n_experts`` copies of each feed-forward and new routers (sparse upcycling).

    Args:
        dense: on the host; also one that has experts already, as many as asked for, which is returned.
        fill: False leaves the parameters without values.

    Raises:
        ConfigError: the model has another number of experts.
    """
    there = dense.config.num_experts
    if there is not None:
        if there != settings.n_experts:
            raise ConfigError(
                "model.n_experts must be that of the encoder-decoder in model.model_name_or_path",
                found=f"{settings.n_experts}, and {there} there",
                remedy="Leave n_experts out: it is read from there",
            )
        return dense
    config = Qwen3EncoderDecoderConfig(**(_kept(dense.config) | expert_fields(settings)))
    model = allocate(config, dense.dtype)
    model.generation_config = dense.generation_config
    if fill:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            fill_from_dense(model, dense, ROUTER_STD)
    return model


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
