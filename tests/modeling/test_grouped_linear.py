"""Every way to run a linear layer per expert, against a loop over tokens."""

import pytest
import torch

from bamoe.modeling.grouped_linear import GRADIENT_COMPILES, ExpertLoop, FewRows, order_by_expert, sum_over_slots

TOKENS, SLOTS, EXPERTS, WIDTH, OUT = 7, 2, 5, 8, 12
HEADS = [None, 1, 2]  # of the output, or of the input, apart in memory


def sorted_pairs(indices):
    return order_by_expert(indices, EXPERTS)


def looped_pairs(indices):
    return ExpertLoop(**vars(order_by_expert(indices, EXPERTS)))


def few_pairs(indices):
    return FewRows(indices.flatten())


def selections(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(TOKENS, EXPERTS, generator=generator).topk(SLOTS).indices


def weight_of(heads, seed=0):
    """(A, out, in) for the naive loop, and the same values as a layer of strided heads takes them."""
    weight = torch.randn(EXPERTS, OUT, WIDTH, generator=torch.Generator().manual_seed(seed))
    if heads is None:
        return weight, weight
    apart = weight.unflatten(heads, (4, -1))
    stored = apart.movedim(0, 2).contiguous() if heads == 2 else apart.transpose(0, 1).contiguous()
    return weight, stored.movedim(2, 0) if heads == 2 else stored.transpose(0, 1)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("ordered", [sorted_pairs, looped_pairs, few_pairs])
def test_rows_go_through_the_weight_of_their_expert(ordered, heads):
    indices, tokens, bias = selections(), torch.randn(TOKENS, WIDTH), torch.randn(EXPERTS, OUT)
    weight, apart = weight_of(heads)
    assert heads is None or not apart.is_contiguous()
    order = ordered(indices)
    found = order.to_slots(order.linear(order.of_tokens(tokens), apart, bias, heads)).view(TOKENS, SLOTS, OUT)
    again = order.to_slots(order.linear(order.of_slots(tokens.repeat_interleave(SLOTS, 0)), apart, bias, heads))
    assert torch.equal(again.view_as(found), found)
    for token in range(TOKENS):
        for slot in range(SLOTS):
            expert = indices[token, slot]
            expected = weight[expert] @ tokens[token] + bias[expert]
            assert torch.allclose(found[token, slot], expected, rtol=1e-5, atol=1e-5)


def gradients(run, tensors):
    found = run(*tensors)
    return found, torch.autograd.grad(found.square().sum(), tensors)


COMPILED = pytest.param(True, marks=pytest.mark.skipif(not GRADIENT_COMPILES, reason="transformers is older"))


@pytest.mark.parametrize("compiled", [False, COMPILED])  # compiled, sizes depend on no data: rows to no expert stay
def test_pairs_that_reach_no_expert_give_nothing_and_get_no_gradient(compiled):
    indices = selections()
    indices[0], indices[3, 1], indices[5, 0] = EXPERTS, EXPERTS, EXPERTS
    tensors = [torch.randn(TOKENS, WIDTH), torch.randn(EXPERTS, OUT, WIDTH)]
    tensors = [tensor.requires_grad_() for tensor in tensors]

    def ours(tokens, weight):
        order = order_by_expert(indices, EXPERTS, some_reach_none=True)
        rows = order.linear(order.of_tokens(tokens), weight)
        rows = order.linear(rows.tanh(), weight.transpose(1, 2))  # what is not computed goes through the middle, too
        return sum_over_slots(order.to_slots(rows).view(TOKENS, SLOTS, WIDTH))

    def naive(tokens, weight):
        sums = []
        for token, experts in zip(tokens, indices, strict=True):
            reached = [weight[e].T @ (weight[e] @ token).tanh() for e in experts if e < EXPERTS]
            sums.append(sum(reached, torch.zeros(WIDTH)))
        return torch.stack(sums)

    torch._dynamo.reset()
    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    (found, ours_gradients), (expected, naive_gradients) = gradients(run, tensors), gradients(naive, tensors)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not found[0].any()
    for ours_gradient, naive_gradient in zip(ours_gradients, naive_gradients, strict=True):
        assert torch.allclose(ours_gradient, naive_gradient, rtol=1e-4, atol=1e-4)


def test_rows_of_no_expert_are_not_computed():
    order = order_by_expert(torch.tensor([[0, EXPERTS], [EXPERTS, 2]]), EXPERTS, some_reach_none=True)
    assert len(order.of_tokens(torch.randn(2, WIDTH))) == 2


def test_gradients_of_gradients():
    order = order_by_expert(selections(), EXPERTS)
    tokens = torch.randn(TOKENS, 4, dtype=torch.float64, requires_grad=True)

    def run(tokens):
        return sum_over_slots(order.to_slots(order.of_tokens(tokens) ** 3).view(TOKENS, SLOTS, 4))

    assert torch.autograd.gradgradcheck(run, tokens)
