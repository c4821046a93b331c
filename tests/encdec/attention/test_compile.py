"""torch.compile: no graph break in a layer, none in the whole model, one graph for all numbers of tokens."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.encdec.attention.batches import loss_and_gradients, tiny_model, tokens, uneven_batch

BACKEND = "aot_eager"
"""Traces forward and backward as inductor's front end does, without its C++ compiler's time."""


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_each_layer_is_one_graph_and_gives_the_same():
    model = tiny_model("split")
    batches = [uneven_batch() for _ in range(3)]
    for batch, length in zip(batches, (9, 8, 7), strict=True):
        batch["attention_mask"][:, length:] = 0
    expected = [loss_and_gradients(model, batch) for batch in batches]
    counter = CompileCounterWithBackend(BACKEND)
    for layer in model.transformer_layers():
        layer.compile(backend=counter, fullgraph=True, dynamic=True)  # fullgraph: a graph break would raise
    for batch, result in zip(batches, expected, strict=True):
        torch.testing.assert_close(loss_and_gradients(model, batch), result, atol=1e-5, rtol=1e-5)
    graphs = [graph for graph in counter.graphs if len(graph.graph.nodes)]
    assert len(graphs) == 2  # encoder layer and decoder layer, each once: numbers of tokens are symbols


@pytest.mark.parametrize(("attention", "masked"), [("split", False), ("sdpa", True)], ids=["whole", "padded"])
def test_the_whole_model_is_one_graph_and_gives_the_same(attention, masked):
    model, batch = tiny_model(attention, num_hidden_layers=1).train(), uneven_batch()
    if not masked:
        batch = {"input_ids": tokens(2, 9), "labels": tokens(2, 7)}
    expected = loss_and_gradients(model, batch)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    model.zero_grad()
    loss = compiled(**batch).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close((loss.detach(), gradients), expected, atol=1e-5, rtol=1e-5)
