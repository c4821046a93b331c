"""The loss in pieces: the plain loss's value and gradients, in memory for one piece."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from encdec import cross_entropy, estimates
from encdec.cross_entropy import MAX_LOGITS_BYTES, chunked_cross_entropy, tokens_per_piece
from encdec.training.config import FullConfig

ROWS, COLUMNS, HIDDEN, VOCABULARY = 3, 11, 16, 96


pytestmark = pytest.mark.filterwarnings("ignore:Input #.* requires gradient and is not a double precision")


@pytest.fixture(autouse=True)
def one_thread_and_a_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [3, 11, H], head [V, H], labels [3, 11] of which about a third are ignored."""
    hidden, head = torch.randn(ROWS, COLUMNS, HIDDEN, dtype=dtype), torch.randn(VOCABULARY, HIDDEN, dtype=dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS, COLUMNS))
    labels[torch.rand(labels.shape) < 0.3] = -100
    assert 10 < (labels != -100).sum() < ROWS * COLUMNS
    return hidden.requires_grad_(), head.requires_grad_(), labels


def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).flatten(0, 1).float(), labels.flatten())


def bound(tokens: int, vocabulary: int = VOCABULARY) -> int:
    return tokens * vocabulary * 4


@pytest.mark.parametrize("piece", [1, 4, 7, 1000])
def test_value_and_gradients_are_those_of_the_plain_loss(piece: int):
    hidden, head, labels = inputs()
    expected = plain(hidden, head, labels)
    gradients = torch.autograd.grad(3 * expected, (hidden, head))
    found = chunked_cross_entropy(hidden, head, labels, max_logits_bytes=bound(piece))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(3 * found, (hidden, head)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert (gradients[0][labels == -100] == 0).all()


def test_gradients_are_those_of_numerical_differentiation():
    hidden, head, _ = inputs()
    small, matrix = hidden[:1, :2].detach(), head[:5, :].detach()
    labels = torch.tensor([[3, 1]])

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return chunked_cross_entropy(hidden, head, labels, max_logits_bytes=bound(1, 5))

    arguments = (small.requires_grad_(), matrix.requires_grad_())
    assert torch.autograd.gradcheck(loss, arguments, eps=1e-2, atol=1e-3, rtol=1e-2, nondet_tol=0)


def test_logits_of_all_tokens_never_exist():
    """The biggest tensor of a step, forward and backward, is one piece's logits; the plain loss makes all of them."""
    tokens, vocabulary, hidden_size, piece = 512, 4096, 8, 32
    hidden = torch.randn(1, tokens, hidden_size, requires_grad=True)
    head, labels = torch.randn(vocabulary, hidden_size, requires_grad=True), torch.randint(0, vocabulary, (1, tokens))
    with Biggest() as chunked:
        chunked_cross_entropy(hidden, head, labels, max_logits_bytes=bound(piece, vocabulary)).backward()
    with Biggest() as whole:
        plain(hidden, head, labels).backward()
    assert chunked.elements == piece * vocabulary
    assert whole.elements == tokens * vocabulary


def test_tokens_without_a_label_are_not_computed():
    hidden, head, labels = inputs()
    labels[:, 2:] = -100
    labels[:, :2] = 5
    head.requires_grad_(False)  # its gradient is bigger
    with Biggest() as found:
        chunked_cross_entropy(hidden, head, labels).backward()
    assert found.elements == 2 * ROWS * VOCABULARY  # and not of 11 * ROWS tokens


def test_without_gradients_none_are_computed():
    hidden, head, labels = inputs()
    with torch.no_grad(), Biggest() as found:
        loss = chunked_cross_entropy(hidden, head, labels, max_logits_bytes=bound(1))
    torch.testing.assert_close(loss, plain(hidden, head, labels).detach(), atol=1e-6, rtol=1e-6)
    assert found.elements <= ROWS * COLUMNS * HIDDEN


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_a_frozen_input_gets_no_gradient(frozen: str):
    hidden, head, labels = inputs()
    expected = torch.autograd.grad(plain(hidden, head, labels), head if frozen == "hidden" else hidden)
    (hidden if frozen == "hidden" else head).requires_grad_(False)
    chunked_cross_entropy(hidden, head, labels, max_logits_bytes=bound(4)).backward()
    kept, lost = (head, hidden) if frozen == "hidden" else (hidden, head)
    torch.testing.assert_close(kept.grad, *expected, atol=1e-6, rtol=1e-6)
    assert lost.grad is None


def test_no_label_at_all_is_a_loss_of_zero_with_gradients_of_zero():
    hidden, head, labels = inputs()
    loss = chunked_cross_entropy(hidden, head, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert (hidden.grad == 0).all() and (head.grad == 0).all()


def test_the_graph_may_be_kept():
    hidden, head, labels = inputs()
    loss = chunked_cross_entropy(hidden, head, labels)
    first = torch.autograd.grad(loss, (hidden, head), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, head))
    assert all(map(torch.equal, first, again))


def test_bfloat16_sums_in_float32():
    """The loss is that of the plain loss of bfloat16 logits, which sums in float32, to six digits and not to three."""
    hidden, head, labels = inputs(torch.bfloat16)
    loss = chunked_cross_entropy(hidden, head, labels, max_logits_bytes=bound(4))
    loss.backward()
    assert (loss.dtype, hidden.grad.dtype, head.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(loss, plain(hidden, head, labels), atol=0, rtol=1e-6)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    F.cross_entropy(F.linear(*exact).flatten(0, 1), labels.flatten()).backward()
    for ours, theirs in ((hidden.grad, exact[0].grad), (head.grad, exact[1].grad)):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_autocast_computes_the_head_in_its_type():
    hidden, head, labels = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, head, labels)
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(hidden, head, labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert head.grad.dtype == torch.float32


def test_a_given_count_divides_the_sum():
    hidden, head, labels = inputs()
    mean, count = chunked_cross_entropy(hidden, head, labels), (labels != -100).sum()
    for given in (50, torch.tensor(50)):
        torch.testing.assert_close(chunked_cross_entropy(hidden, head, labels, given), mean * count / 50)


def test_one_bound_for_loss_configuration_and_estimate():
    assert MAX_LOGITS_BYTES == estimates.MAX_LOGITS_BYTES == FullConfig().model.max_logits_mb * 10**6
    assert tokens_per_piece(151_936, cross_entropy.MAX_LOGITS_BYTES) == 842
    assert tokens_per_piece(151_936, 1) == 1


class Biggest(TorchDispatchMode):
    """Elements of the biggest tensor that any operation made; views of what was there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made = [tensor.numel() for tensor in tensors if tensor.untyped_storage().data_ptr() not in given]
        self.elements = max(self.elements, *made, 0)
        return result
