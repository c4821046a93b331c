"""What an encoder-decoder offers transformers and its users beside the forward pass: embedding, generation, saving.

Shapes: B examples, S_d decoder tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from encdec.configuration_qwen3_encdec import Qwen3EncoderDecoderConfig
from encdec.cross_entropy import IGNORED_LABEL
from encdec.errors import ConfigError
from encdec.hub_code import write_code
from encdec.model_card import MODEL_CARD, model_card, write_model_card
from encdec.model_inputs import check_length, check_token_ids

TEMPLATE_CARD = "This model card has been automatically generated"
"""What transformers' card for a model without one says."""


class Seq2SeqInterface:
    """For a `PreTrainedModel` with `GenerationMixin` whose encoder and decoder borrow its one embedding, `shared`."""

    config: Qwen3EncoderDecoderConfig
    shared: nn.Embedding
    encoder: Any
    decoder: Any

    def get_input_embeddings(self) -> nn.Embedding:
        return self.shared

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.shared = value
        self.encoder.borrow_embedding(value)
        self.decoder.borrow_embedding(value)

    def get_output_embeddings(self) -> None:
        """None: the head has no module of its own to resize or tie."""

    def get_encoder(self, modality: str | None = None) -> Any:
        return self.encoder

    def get_decoder(self) -> Any:
        return self.decoder

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """transformers' own, but never to fewer rows than the configuration's token ids need.

        Args:
            new_num_tokens: rows; None: as many as there are.
            pad_to_multiple_of: rows are rounded up to this.
            mean_resizing: draw new rows from mean and covariance of the old ones.

        Returns:
            The one embedding, [V, H], that encoder, decoder and head share.

        Raises:
            ConfigError: a sentinel, a mode token, the padding, the end or the start token would lose its row.
        """
        config, multiple = self.config, pad_to_multiple_of or 1
        if new_num_tokens is not None:
            rows = -(-new_num_tokens // multiple) * multiple
            assert isinstance(config.eos_token_id, int)  # as the configuration demands
            highest = max(config.pad_token_id or 0, config.eos_token_id, config.decoder_start_token_id)
            highest = max([highest, *(config.mode_token_ids or ())])
            needed = max(highest + 1, config.sentinel_start_id + config.num_sentinel_tokens)
            if rows < needed:
                raise ConfigError(
                    f"the embedding must keep the rows of the sentinels and special tokens, {needed} at least",
                    found=f"new_num_tokens={new_num_tokens}",
                    remedy=f"Resize to {needed} or more, or build a model with fewer sentinels",
                )
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)  # type: ignore[misc]

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """[B, S_d] labels -> [B, S_d] decoder inputs: shifted right behind the start token, -100 read as padding."""
        shifted = F.pad(labels, (1, 0), value=self.config.decoder_start_token_id)[:, :-1]
        return shifted.masked_fill(shifted == IGNORED_LABEL, self.config.pad_token_id or 0)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own `generate`, after a look at the token ids, on whatever device they are.

        Where no `attention_mask` is given, padding in `inputs` is masked, as T5Gemma's encoder does it.

        Raises:
            InputError: an id has no row in the embedding, or the input is too long.
        """
        inputs = kwargs.pop("input_ids", None) if inputs is None else inputs
        for name, ids in (("input_ids", inputs), ("decoder_input_ids", kwargs.get("decoder_input_ids"))):
            if torch.is_tensor(ids):
                check_token_ids(name, ids, self.config.vocab_size)
                check_length(name, ids.shape[-1], self.config)
        if torch.is_tensor(inputs) and inputs.ndim == 2 and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = inputs.ne(self.config.pad_token_id or 0).long()
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str | Path, *, is_main_process: bool = True, **kwargs: Any) -> None:
        """As transformers' own; beside it the model's code and, where there is no README.md yet, a model card."""
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
        if self.should_save_on_this_rank(is_main_process):  # type: ignore[attr-defined]
            write_code(Path(save_directory))
            write_model_card(Path(save_directory), model_card(self.config, self.num_parameters()))  # type: ignore[attr-defined]

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, which `push_to_hub` ends with, but our card instead of its empty template."""
        path = Path(working_dir, MODEL_CARD)
        if path.is_file() and TEMPLATE_CARD in path.read_text(encoding="utf-8"):
            path.unlink()
            write_model_card(path.parent, model_card(self.config, self.num_parameters()))  # type: ignore[attr-defined]
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]
