import pytest
import torch

from bamoe.modeling.losses import router_losses
from bamoe.modeling.routing import AttentionRouter, FeedForwardRouter


def make_router(kind, top_k, **options):
    router = kind(8, 4, top_k, **options)
    torch.nn.init.normal_(router.weight)
    return router


def test_top_k_of_a_softmax_over_all_experts():
    router, tokens = make_router(FeedForwardRouter, 2), torch.randn(5, 8)
    routed = router(tokens)
    for n in range(5):
        probabilities = torch.softmax(router.weight @ tokens[n], 0)
        best = sorted(range(4), key=lambda e: -probabilities[e])[:2]
        assert routed.indices[n].tolist() == best
        assert torch.allclose(routed.weights[n], probabilities[best])


def test_normalisation_and_scale():
    tokens = torch.randn(5, 8)
    routed = make_router(FeedForwardRouter, 2, gate_norm="topk_softmax", scale=3.0)(tokens)
    assert torch.allclose(routed.weights.sum(-1), torch.full((5,), 3.0))


def test_soft_routing_selects_every_expert_with_gates_that_sum_to_one():
    soft = make_router(AttentionRouter, None)(torch.randn(2, 5, 8))
    assert (soft.indices == torch.arange(4)).all()
    assert torch.allclose(soft.weights.sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize("autocast", [False, True])
def test_arithmetic_is_float32_in_a_bfloat16_model(autocast):
    router = make_router(FeedForwardRouter, 1).bfloat16()
    tokens = torch.randn(6, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = router(tokens).logits
    assert logits.dtype == torch.float32
    assert torch.equal(logits, tokens.float() @ router.weight.float().T)


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balance_is_one_per_layer_when_uniform(top_k):
    """Each token prefers another expert by an equal margin: f and P are both uniform."""
    logits = 0.001 * torch.eye(4).repeat(5, 1) + 0.0001 * torch.eye(4).roll(1, 1).repeat(5, 1)
    losses = router_losses([logits] * 3, top_k)
    assert losses.load_balance.item() == pytest.approx(3.0, rel=1e-6)


def test_layers_collapsed_on_different_experts_are_each_penalised():
    logits = [torch.full((10, 4), -20.0).index_fill(1, torch.tensor(layer), 20.0) for layer in range(4)]
    assert router_losses(logits, 1).load_balance.item() == pytest.approx(4 * 4.0, rel=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_losses_agree_with_a_loop_over_tokens(top_k, masked):
    logits = [torch.randn(7, 4) for _ in range(2)]
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1]) if masked else torch.ones(7)
    load_balance, z = 0.0, 0.0
    for layer in logits:
        counts, sums, squares = [0.0] * 4, [0.0] * 4, 0.0
        real = [n for n in range(7) if mask[n]]
        for n in real:
            probabilities = torch.softmax(layer[n], 0)
            for e in range(4):
                sums[e] += probabilities[e].item()
            for e in probabilities.argsort(descending=True)[:top_k].tolist():
                counts[e] += 1
            squares += torch.logsumexp(layer[n], 0).item() ** 2
        load_balance += 4 * sum(c / (top_k * len(real)) * s / len(real) for c, s in zip(counts, sums, strict=True))
        z += squares / len(real)
    losses = router_losses(logits, top_k, mask if masked else None)
    assert losses.load_balance.item() == pytest.approx(load_balance, rel=1e-5)
    assert losses.z.item() == pytest.approx(z, rel=1e-5)


def test_gradient_flows_through_probabilities_only():
    logits = torch.randn(6, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(router_losses([logits], 1).load_balance, logits)
    fractions = torch.bincount(logits.argmax(-1), minlength=3) / 6
    (expected,) = torch.autograd.grad(3 * (fractions * logits.softmax(-1).mean(0)).sum(), logits)
    assert torch.allclose(gradient, expected, atol=1e-7)
