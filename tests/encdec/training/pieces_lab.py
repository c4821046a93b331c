"""The loss in pieces under an engine against the plain one in one process; to be called in ranks (tests.many_ranks)."""

from __future__ import annotations

import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from encdec import distributed
from encdec.training.config import FullConfig
from encdec.training.engines import start_engine
from tests.encdec.tiny_model import padded, tiny_model, tokens

EXAMPLES_A_RANK, TOKENS_A_PIECE = 2, 3


def compare(name: str) -> None:
    """Loss and gradient norm of all ranks' examples, whose labels take several pieces on each rank.

    Args:
        name: infra.distributed_type.
    """
    model = tiny_model().train()
    whole = copy.deepcopy(model)
    ids, mask = padded([tokens(length) for length in range(3, 3 + EXAMPLES_A_RANK * distributed.world_size())])
    labels = tokens(len(ids), 7)
    labels[1::2, 4:] = -100
    count = int((labels != -100).sum())
    logits = whole(ids, mask, labels, return_logits=True).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected.backward()
    expected_norm = math.sqrt(sum(float(p.grad.square().sum()) for p in whole.parameters()))

    config = FullConfig()
    config.infra.device, config.infra.distributed_type = "cpu", name
    engine = start_engine(
        model, config, device=torch.device("cpu"), dtype=torch.float32, micro_batch_size=EXAMPLES_A_RANK,
        accumulation_steps=1,
    )  # fmt: skip
    model.max_logits_bytes = TOKENS_A_PIECE * model.config.vocab_size * 4
    mine = slice(EXAMPLES_A_RANK * distributed.rank(), EXAMPLES_A_RANK * (distributed.rank() + 1))
    engine.set_sync(True)
    output = engine.module(
        input_ids=ids[mine], attention_mask=mask[mine], labels=labels[mine], num_items_in_batch=count
    )
    assert output.logits is None
    engine.backward(output.loss)
    squares = sum(float(gradient.double().square().sum()) for gradient in engine.local_gradients())
    sums = torch.tensor([output.loss.item(), squares], dtype=torch.float64)
    dist.all_reduce(sums)
    assert math.isclose(sums[0].item(), expected.item(), rel_tol=1e-6)
    assert math.isclose(engine.averaged_over * math.sqrt(sums[1].item()), expected_norm, rel_tol=1e-5)
