"""The head is in shards outside the forward pass: the loss in pieces finds it whole, and its gradient goes back."""

from __future__ import annotations

import pytest

from tests.encdec.training import pieces_lab
from tests.many_ranks import in_ranks


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_sharded_loss_and_gradient_norm_are_those_of_the_plain_loss(engine: str):
    in_ranks(2, pieces_lab.compare, engine)
