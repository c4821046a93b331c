"""A decoder-only Qwen3's weights under the names of the encoder-decoder that starts from them.

Both stacks read the same layers. Embedding rows from the first sentinel on, which no text of the source ever reached,
are drawn from the mean and the standard deviation (per dimension) of the rows before it, with a fixed seed.

Shape legend:
    V_s  rows of the source's embedding    V  rows of ours, >= V_s    H  hidden size    U  rows in use, <= V_s
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from encdec.checkpoints.weights import Piece, shape_in, whole
from encdec.configuration_qwen3_encdec import QWEN3_USED_ROWS, QWEN3_VOCAB_SIZE, Qwen3EncoderDecoderConfig
from encdec.errors import ConfigError
from encdec.initialization.source import SourceFiles

EMBEDDING = "shared.weight"
UNUSED_ROWS_SEED = 20  # any constant: sentinels start alike in every run
COLUMNS_AT_ONCE = 64
"""Of the embedding, in float32, while its statistics are taken."""
OWN_HEAD = "our head is the embedding"
COMPUTED = "computed from the config"

# Every key of a Qwen3 checkpoint, the parameters it fills, and why where there are none.
KEY_MAP: tuple[tuple[re.Pattern[str], tuple[str, ...], str], ...] = (
    (re.compile(r"model\.embed_tokens\.weight"), (EMBEDDING,), ""),
    (re.compile(r"model\.(layers\.\d+\..+(?<!inv_freq))"), (r"encoder.\1", r"decoder.\1"), ""),
    (re.compile(r"model\.(norm\.weight)"), (r"encoder.\1", r"decoder.\1"), ""),
    (re.compile(r"lm_head\.weight"), (), OWN_HEAD),
    (re.compile(r"model\..*rotary_emb\.inv_freq"), (), COMPUTED),
)


@dataclass(frozen=True)
class KeyPlan:
    """Which tensor of the source goes where."""

    targets: Mapping[str, str]
    """Parameter of ours -> the source's key."""
    unused: Mapping[str, str]
    """The source's key -> why nothing reads it."""


def target_names(source_name: str) -> tuple[str, ...]:
    """The parameters a Qwen3 checkpoint's key fills; none for those left out on purpose.

    Raises:
        ConfigError: `KEY_MAP` does not know the key.
    """
    return _mapped(source_name)[0]


def _mapped(source_name: str) -> tuple[tuple[str, ...], str]:
    for pattern, templates, reason in KEY_MAP:
        if match := pattern.fullmatch(source_name):
            return tuple(match.expand(template) for template in templates), reason
    raise ConfigError(
        "every tensor of the source must have a place in the encoder-decoder",
        found=source_name,
        remedy="Give a dense Qwen3 checkpoint without adapters or quantisation",
    )


def plan_keys(source: Mapping[str, Tensor], parameters: Mapping[str, torch.Size]) -> KeyPlan:
    """Give every tensor of the source its place, from names and shapes alone.

    Args:
        source: name -> tensor, on the meta device for all that it matters.
        parameters: of the encoder-decoder, name -> shape.

    Raises:
        ConfigError: a tensor has no place, a shape differs, or a parameter stays without values.
    """
    targets: dict[str, str] = {}
    unused: dict[str, str] = {}
    for source_name, tensor in source.items():
        names, reason = _mapped(source_name)
        if not names:
            unused[source_name] = reason
        for name in names:
            if not _fits(name, tensor.shape, parameters.get(name)):
                raise ConfigError(
                    "the source's tensors must have the shapes its config gives",
                    found=f"{source_name} {tuple(tensor.shape)} for {name} {shape_in(parameters, name)}",
                    remedy="Check that config.json belongs to these weights",
                )
            targets[name] = source_name
    unfilled = sorted(parameters.keys() - targets.keys())
    if unfilled:
        more = f" and {len(unfilled) - 3} more" if len(unfilled) > 3 else ""
        raise ConfigError(
            "the source must fill every parameter",
            found=f"nothing for {', '.join(unfilled[:3])}{more}",
            remedy="Download the checkpoint again, or check that config.json belongs to these weights",
        )
    return KeyPlan({name: targets[name] for name in parameters}, unused)


def require_tokenizers_rows(source_rows: int, used_rows: int) -> None:
    """The source must have learnt a row for each token that its tokenizer makes of text.

    Args:
        source_rows: V_s.
        used_rows: tokens before the first sentinel.

    Raises:
        ConfigError: it cannot be the source's tokenizer.
    """
    remedy = "Use the tokenizer that was saved with the source"
    if used_rows > source_rows:
        raise ConfigError(
            "every token of the source's tokenizer must have a row in its embedding",
            found=f"{used_rows} tokens and {source_rows} rows",
            remedy=remedy,
        )
    if source_rows == QWEN3_VOCAB_SIZE and used_rows < QWEN3_USED_ROWS:
        raise ConfigError(
            f"Qwen3's {QWEN3_VOCAB_SIZE:,} rows belong to a tokenizer of {QWEN3_USED_ROWS:,} tokens or more",
            found=f"{used_rows:,}",
            remedy=remedy,
        )


class Qwen3Weights:
    """The parameters of an encoder-decoder, read from a Qwen3's files; `encdec.checkpoints.weights.Weights`.

    Args:
        source: the checkpoint.
        config: of the encoder-decoder.
        parameters: its parameters, name -> shape.

    Raises:
        ConfigError: the source does not fill exactly these parameters.
    """

    def __init__(
        self, source: SourceFiles, config: Qwen3EncoderDecoderConfig, parameters: Mapping[str, torch.Size]
    ) -> None:
        self.source, self.plan = source, plan_keys(source.tensors, parameters)
        self.first_drawn = config.sentinel_start_id
        self.tensors: Mapping[str, Tensor] = {
            name: torch.empty(shape, dtype=self._dtype(name), device="meta") for name, shape in parameters.items()
        }
        self._drawn: Tensor | None = None

    def pieces(self, name: str) -> Sequence[Piece]:
        return [whole(self.tensors[name])]

    def read(self, name: str, piece: Piece | None = None) -> Tensor:
        """A parameter or one box of it, in the source's type, the embedding in float32.

        Raises:
            MissingPrerequisite: the source cannot be read.
        """
        if name != EMBEDDING:
            return self.source.read(self.plan.targets[name], piece)
        piece = piece or whole(self.tensors[name])
        (row, column), (rows, columns) = piece.offsets, piece.sizes
        values = torch.empty(piece.sizes, dtype=torch.float32)
        learnt = min(max(self.first_drawn - row, 0), rows)
        if learnt:
            values[:learnt] = self.source.read(self.plan.targets[name], Piece(piece.offsets, (learnt, columns)))
        if learnt < rows:
            first = row + learnt - self.first_drawn
            values[learnt:] = self._drawn_rows()[first : first + rows - learnt, column : column + columns]
        return values

    def _dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name == EMBEDDING else self.source.tensors[self.plan.targets[name]].dtype

    def _drawn_rows(self) -> Tensor:
        """[V - U, H] float32; made where first asked for. The source's embedding is in memory while it is."""
        if self._drawn is None:
            learnt = self.source.read(self.plan.targets[EMBEDDING])[: self.first_drawn]
            number = self.tensors[EMBEDDING].shape[0] - self.first_drawn
            self._drawn = draw_rows(learnt, number)
        return self._drawn


def draw_rows(learnt: Tensor, number: int) -> Tensor:
    """Rows that resemble others: [U, H] of any type -> [number, H] float32."""
    noise = torch.randn(number, learnt.shape[1], generator=torch.Generator().manual_seed(UNUSED_ROWS_SEED))
    for columns, of_noise in zip(learnt.split(COLUMNS_AT_ONCE, 1), noise.split(COLUMNS_AT_ONCE, 1), strict=True):
        values = columns.float()  # of some columns: the statistics are those of all at once, bit for bit
        of_noise.mul_(values.std(0)).add_(values.mean(0))
    return noise


def _fits(name: str, shape: torch.Size, wanted: torch.Size | None) -> bool:
    if wanted is None:
        return False
    if name == EMBEDDING:  # ours may have grown
        return shape[1:] == wanted[1:] and shape[0] <= wanted[0]
    return shape == wanted
