"""MoE++'s feed-forward layer: its equations, which rows reach the experts' kernels, balance, capacities."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bamoe.modeling.costs import expected_experts_per_token
from bamoe.modeling.feed_forward import MixtureOfFeedForward
from bamoe.modeling.losses import router_losses
from bamoe.modeling.routing import FeedForwardRouter, limit_assignments
from tests.modeling.conftest import tiny_config
from tests.modeling.naive import assert_same, naive_feed_forward

PAPER: dict[str, Any] = {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2}
RELEASED: dict[str, Any] = {
    "feed_forward_router": "tanh_mlp",
    "norm_topk_prob": True,
    "drop_zero_gates": True,
    "expert_input_scale": 2.0,
}
ROUTED = 3 + 4
BACKENDS = ["eager", "batched_mm", "grouped_mm"]


def make(layer_idx: int = 1, **changes: Any) -> MixtureOfFeedForward:
    """A layer in evaluation mode, every parameter random."""
    mixture = MixtureOfFeedForward(tiny_config(**(PAPER | changes)), layer_idx).eval()
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return mixture


def routed_by(mixture: MixtureOfFeedForward) -> MixtureOfFeedForward:
    """The layer, made to route by the logits that are handed to it."""
    with torch.no_grad():
        mixture.gate.weight.zero_()
        mixture.gate.residual_weight.copy_(torch.eye(len(mixture.gate.weight)))
    return mixture


def selecting(*experts: list[int], total: int = ROUTED) -> torch.Tensor:
    """Logits of tokens that select these experts, in this order."""
    logits = torch.zeros(len(experts), total)
    for n, chosen in enumerate(experts):
        logits[n, chosen] = torch.arange(len(chosen), 0, -1.0)
    return logits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_topk_prob": True, "routed_scaling_factor": 1.5},
        {"feed_forward_router": "tanh_mlp", "expert_input_scale": 2.0},
        RELEASED,
        {"gating_residuals": False, "num_experts_per_tok": 1},
        {"num_experts": 1, "num_experts_per_tok": 3},
        {"num_zero_experts": 2, "num_copy_experts": 0, "num_constant_experts": 0},
        {"num_zero_experts": 0, "num_copy_experts": 2, "num_constant_experts": 0},
        {"num_zero_experts": 0, "num_copy_experts": 0, "num_constant_experts": 3},
        {"num_zero_experts": 0, "num_copy_experts": 0, "num_constant_experts": 0, "gating_residuals": True},
    ],
    ids=["paper", "normalised", "tanh", "released", "plain top-1", "E=1", "zero", "copy", "constant", "only residuals"],
)
def test_equals_a_loop_over_tokens_and_experts(backend, changes):
    mixture = make(experts_implementation=backend, **changes)
    hidden_states = torch.randn(2, 9, 32, requires_grad=True)
    previous = torch.randn(18, mixture.gate.weight.shape[0], requires_grad=True)
    output, logits, dropped = mixture(hidden_states, previous)
    expected, expected_logits = naive_feed_forward(
        mixture, tiny_config(**(PAPER | changes)), hidden_states.flatten(0, 1), previous
    )
    inputs = {"hidden_states": hidden_states, "previous": previous} | dict(mixture.named_parameters())
    assert_same(torch.cat([output.flatten(0, 1), logits], -1), torch.cat([expected, expected_logits], -1), inputs)
    assert dropped is None


def test_a_token_that_selects_zero_experts_alone_stays_as_it_is_with_their_gates_dropped():
    config = {"norm_topk_prob": True, "drop_zero_gates": True, "num_zero_experts": 2}
    mixture = routed_by(make(**config))
    hidden_states = torch.randn(1, 2, 32, requires_grad=True)
    # The second one selects an expert beside a zero expert, and gives it all.
    previous = selecting([3, 4], [0, 3], total=8).requires_grad_()
    output, _, _ = mixture(hidden_states, previous)
    assert not output[0, 0].any()
    assert mixture.gate(hidden_states[0], previous).weights.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    gate, up = F.linear(hidden_states[0, 1], mixture.experts.gate_up_proj[0]).chunk(2, -1)
    assert torch.allclose(output[0, 1], F.linear(F.silu(gate) * up, mixture.experts.down_proj[0]), atol=1e-5)
    output.square().sum().backward()
    for tensor in (hidden_states, previous, *mixture.parameters()):
        assert tensor.grad.isfinite().all()


@pytest.fixture
def kernel_rows(monkeypatch):
    """Rows of every matrix product with an expert's weights, of the eager loop and of grouped_mm."""
    rows: list[int] = []
    grouped, linear = F.grouped_mm, F.linear

    def counting_grouped(inputs, weight, offs):
        rows.append(len(inputs))
        assert 0 < offs[-1] == len(inputs)  # some strides of empty gradients are refused
        return grouped(inputs, weight, offs=offs)

    def counting_linear(inputs, weight, bias=None):
        if {48, 2 * 48} & set(weight.shape):  # an expert's width
            rows.append(len(inputs))
        return linear(inputs, weight, bias)

    monkeypatch.setattr(F, "grouped_mm", counting_grouped)
    monkeypatch.setattr(F, "linear", counting_linear)
    return rows


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
def test_only_assignments_to_feed_forward_experts_reach_a_kernel(kernel_rows, backend, training):
    mixture = make(experts_implementation=backend, expert_capacity_factor=0.7).train(training)
    hidden_states, previous = torch.randn(4, 25, 32), torch.randn(100, ROUTED)
    _, logits, dropped = mixture(hidden_states, previous)
    assigned = torch.bincount(logits.topk(2).indices.flatten(), minlength=ROUTED)
    lost = dropped if training else torch.zeros_like(assigned)
    assert lost[:3].sum() > 0 or not training
    assert sum(kernel_rows) == 2 * (assigned - lost)[:3].sum()  # up, then down
    assert 0 < sum(kernel_rows) < 2 * 2 * 100


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_on_a_feed_forward_expert(kernel_rows, backend):
    mixture = routed_by(make(experts_implementation=backend))
    hidden_states = torch.randn(1, 3, 32, requires_grad=True)
    previous = selecting([3, 4], [4, 5], [6, 5]).requires_grad_()
    output, logits, _ = mixture(hidden_states, previous)
    expected, _ = naive_feed_forward(mixture, tiny_config(**PAPER), hidden_states[0], previous)
    assert torch.allclose(output[0], expected, atol=1e-5)
    (output.square().sum() + router_losses([logits], 2).load_balance).backward()
    # Every weight has its gradient, if zero: data parallelism waits for them all.
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any() == ("experts" not in name), name
    assert sum(kernel_rows) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_without_a_token(backend):
    mixture = routed_by(make(experts_implementation=backend))
    hidden_states, previous = torch.randn(1, 3, 32, requires_grad=True), selecting([1, 4], [4, 1], [6, 5])
    output, _, _ = mixture(hidden_states, previous)
    expected, _ = naive_feed_forward(mixture, tiny_config(**PAPER), hidden_states[0], previous)
    assert_same(output[0], expected, {"hidden_states": hidden_states} | dict(mixture.named_parameters()))
    mixture(hidden_states, previous)[0].square().sum().backward()
    assert [bool(each.any()) for each in mixture.experts.down_proj.grad] == [False, True, False]


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
def test_under_autocast_it_is_the_mixture_of_the_same_weights(backend):
    mixture, previous = make(experts_implementation=backend), torch.randn(10, ROUTED)
    hidden_states = torch.randn(1, 10, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, logits, _ = mixture(hidden_states, previous)
    expected, expected_logits, _ = mixture(hidden_states, previous)
    assert output.dtype == logits.dtype == torch.float32
    assert torch.equal(logits, expected_logits)
    assert torch.allclose(output, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def weights(tau: float) -> tuple[float, ...]:
    found = tiny_config(**PAPER, zero_computation_tau=tau).load_balance_weights
    assert found is not None
    return found


def test_load_balance_at_uniform():
    """f_i = K/N and P_i = 1/N: L = K/N² · Σ η_i."""
    logits = 0.001 * torch.eye(ROUTED).repeat(3, 1) + 0.0001 * torch.eye(ROUTED).roll(1, 1).repeat(3, 1)
    for tau in (0.25, 0.75):
        found = router_losses([logits] * 2, 2, expert_weights=weights(tau)).load_balance
        assert found.item() == pytest.approx(2 * 2 / ROUTED**2 * (3 + 4 * tau), rel=1e-3)


@pytest.mark.parametrize("tau", [0.25, 0.5])
def test_load_balance_at_equilibrium(tau):
    """f and P both proportional to 1/η: L = K / Σ 1/η_i, less than at uniform."""
    shares = torch.tensor(tiny_config(**PAPER, zero_computation_tau=tau).expert_shares)
    assert torch.allclose(shares[:3] / shares[3:].mean(), torch.full((3,), tau))
    # One expert per token, as often as its share; certain of it, so that P = f.
    counts = (shares / shares.min()).round().long()
    assert torch.allclose(counts / counts.sum(), shares)
    logits = 60.0 * torch.eye(ROUTED).repeat_interleave(counts, 0)
    found = router_losses([logits], 1, expert_weights=weights(tau)).load_balance.item()
    assert found == pytest.approx(1 / (3 + 4 / tau), rel=1e-5)
    uniform = router_losses([60.0 * torch.eye(ROUTED)], 1, expert_weights=weights(tau)).load_balance.item()
    assert found < uniform


def test_without_a_preference_it_is_the_plain_loss_in_the_papers_units():
    logits, mask = [torch.randn(20, ROUTED) for _ in range(2)], torch.randint(0, 2, (20,))
    plain = router_losses(logits, 2, mask)
    ours = router_losses(logits, 2, mask, expert_weights=weights(1.0))
    assert torch.allclose(ours.load_balance, plain.load_balance * 2 / ROUTED)
    assert torch.equal(ours.z, plain.z)


def test_load_balance_is_the_papers_sum():
    logits = torch.randn(20, ROUTED)
    probabilities, expected = logits.softmax(-1), 0.0
    for i, weight in enumerate([1, 1, 1, 0.3, 0.3, 0.3, 0.3]):
        selected = sum(i in token.topk(2).indices for token in logits) / 20
        expected += weight * selected * probabilities[:, i].mean().item()
    found = router_losses([logits], 2, expert_weights=weights(0.3)).load_balance
    assert found.item() == pytest.approx(expected, rel=1e-5)


def naive_limit(logits: torch.Tensor, limits: list[int], real: list[bool]) -> tuple[list[list[bool]], list[int]]:
    """First choices of all tokens, then second ones."""
    taken, dropped = [0] * len(limits), [0] * len(limits)
    kept = [[True, True] for _ in logits]
    for choice in range(2):
        for n, token in enumerate(logits):
            expert = int(token.argsort(descending=True)[choice])
            if not real[n]:
                continue
            if taken[expert] < limits[expert]:
                taken[expert] += 1
            else:
                kept[n][choice] = False
                dropped[expert] += 1
    return kept, dropped


@pytest.mark.parametrize("padded", [False, True])
def test_over_full_experts_drop_what_a_loop_drops(padded):
    mixture = make(expert_capacity_factor=0.8, zero_computation_tau=0.5).train()
    hidden_states, previous = torch.randn(2, 20, 32), torch.randn(40, ROUTED)
    mask = torch.ones(2, 20, dtype=torch.long)
    if padded:
        mask[1, 11:] = 0
    output, logits, dropped = mixture(hidden_states, previous, mask if padded else None)
    tokens = int(mask.sum())
    shares = [0.5] * 3 + [1.0] * 4
    limits = [-int(-0.8 * 2 * tokens * share // sum(shares)) for share in shares]  # rounded up
    kept, expected = naive_limit(logits, limits, mask.flatten().bool().tolist())
    assert dropped.tolist() == expected
    assert sum(expected) > 0
    # Without renormalisation a token's second choice adds to its first.
    inputs = hidden_states.flatten(0, 1)
    first, both = (
        naive_feed_forward(mixture, tiny_config(**PAPER, num_experts_per_tok=k), inputs, previous)[0] for k in (1, 2)
    )
    chosen = torch.stack([first, both - first], 1)
    assert torch.allclose(output.flatten(0, 1), (chosen * torch.tensor(kept)[..., None]).sum(1), atol=1e-4)


@pytest.mark.parametrize("tau", [0.25, 0.75])
def test_capacities_sum_to_the_assignments_and_stand_as_tau(tau):
    mixture = make(zero_computation_tau=tau, expert_capacity_factor=1.1)
    capacities = mixture.capacities(torch.ones(500, 2), None)
    assert capacities.sum().item() == pytest.approx(1.1 * 2 * 500, rel=1e-5)
    assert torch.allclose(capacities[:3] / capacities[3:].mean(), torch.full((3,), tau))
    assert capacities[:3].unique().numel() == capacities[3:].unique().numel() == 1
    half = torch.arange(500) % 2
    assert torch.allclose(mixture.capacities(torch.ones(500, 2), half), capacities / 2)


def test_a_plain_mixture_can_have_capacities_too():
    plain = {"num_zero_experts": 0, "num_copy_experts": 0, "num_constant_experts": 0}
    mixture = make(0, **plain, expert_capacity_factor=1.0).train()
    assert torch.allclose(mixture.capacities(torch.ones(30, 2), None), torch.full((3,), 20.0))
    _, logits, dropped = mixture(torch.randn(1, 30, 32))
    assigned = torch.bincount(logits.topk(2).indices.flatten(), minlength=3)
    assert dropped.tolist() == (assigned - 20).clamp_min(0).tolist()
    assert dropped.sum() > 0


def test_a_large_factor_drops_nothing_and_evaluation_never_does():
    mixture, hidden_states, previous = make(), torch.randn(2, 20, 32), torch.randn(40, ROUTED)
    expected, _, dropped = mixture(hidden_states, previous)
    assert dropped is None
    mixture.train()
    mixture.capacity_factor = 100.0
    output, _, dropped = mixture(hidden_states, previous)
    assert torch.equal(output, expected)
    assert dropped.tolist() == [0] * ROUTED
    mixture.capacity_factor = 0.0
    output, _, dropped = mixture(hidden_states, previous)
    assert torch.equal(output, expected)
    assert dropped is None


def test_whole_capacities_are_not_rounded_up():
    indices = torch.tensor([[0], [0], [0], [1]])
    kept, dropped = limit_assignments(indices, torch.tensor([2.0000001, 0.2]))
    assert kept.flatten().tolist() == [True, True, False, True]
    assert dropped.tolist() == [1, 0]


def test_a_router_with_residuals_needs_the_layer_before():
    router = FeedForwardRouter(8, 4, 2, gating_residuals=True)
    with pytest.raises(ValueError, match="router logits of the layer before"):
        router(torch.randn(3, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 0},
            r"num_constant_experts = 2 needs a width.*hidden_size must be a positive integer, found 0",
        ),
        ({"hidden_size": None}, r"num_constant_experts = 2 .*hidden_size .*found None"),
        ({"num_experts_per_tok": 8}, r"between 1 and num_experts \+ zero-computation experts \(7\), found 8"),
        ({"feed_forward_routing": "soft", "num_experts_per_tok": None}, "4 zero-computation experts .*use top_k"),
        ({"num_copy_experts": -1}, "num_copy_experts must be 0 or a positive integer, found -1"),
        ({"num_zero_experts": 1.5}, "num_zero_experts must be 0 or a positive integer, found 1.5"),
        ({"zero_computation_tau": 0}, "zero_computation_tau must be a number greater than 0, found 0"),
        ({"zero_computation_tau": "high"}, "zero_computation_tau must be a number greater than 0, found 'high'"),
        ({"expert_capacity_factor": -0.5}, "expert_capacity_factor must be a number of at least 0, found -0.5"),
        ({"expert_input_scale": float("nan")}, "expert_input_scale must be a number"),
        ({"feed_forward_router": "deep"}, "feed_forward_router must be one of"),
        ({"gating_residuals": 1}, "gating_residuals must be true or false, found 1"),
        ({"drop_zero_gates": True}, "drop_zero_gates .* needs norm_topk_prob"),
    ],
)
def test_refuses_what_no_layer_can_be_built_from(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**(PAPER | changes))


@pytest.mark.parametrize(
    "changes", [{"gating_residuals": True}, {"expert_capacity_factor": 1.1}, {"feed_forward_router": "tanh_mlp"}]
)
def test_router_options_without_a_router_are_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} = .* there is no feed-forward router"):
        tiny_config(num_experts=1, num_experts_per_tok=1, **changes)


@pytest.mark.parametrize(
    ("experts", "zeros", "top_k", "tau", "shares"),
    [
        (1, 1, 2, 0.75, (1 / 2, 1 / 2)),  # everything is selected
        (4, 2, 6, 2.0, (1 / 6,) * 6),
        (4, 2, 5, 2.0, (0.2, 0.2, 0.2, 0.2, 0.1, 0.1)),  # 4 take 8/10 in the end
        (4, 1, 3, 0.1, (1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 3)),  # by η the last would have 10/14
        (3, 1, 3, 3.0, (0.3, 0.3, 0.3, 0.1)),  # no limit
    ],
)
def test_a_token_selects_an_expert_at_most_once(experts, zeros, top_k, tau, shares):
    config = tiny_config(
        num_experts=experts, num_zero_experts=zeros, num_experts_per_tok=top_k, zero_computation_tau=tau
    )
    assert config.expert_shares == pytest.approx(shares)
    assert expected_experts_per_token(config) == pytest.approx(top_k * sum(shares[:experts]))


DROPPING = {"norm_topk_prob": True, "drop_zero_gates": True, "num_zero_experts": 2, "num_constant_experts": 0}


@pytest.mark.parametrize(
    ("changes", "blind"),
    [
        (DROPPING | {"num_experts": 1, "num_copy_experts": 0}, True),
        (DROPPING | {"num_experts": 1, "num_copy_experts": 1}, False),
        (DROPPING | {"num_experts": 2, "num_copy_experts": 0}, False),
        (DROPPING | {"num_experts": 1, "num_copy_experts": 0, "drop_zero_gates": False}, False),
    ],
)
def test_a_router_that_weighs_one_expert_alone_is_blind(changes, blind):
    """Its gate is 1 where it is selected, whatever the logits."""
    config = tiny_config(**changes)
    assert config.task_blind_routers == (("mlp.gate",) if blind else ())
    mixture = MixtureOfFeedForward(config)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    loss = mixture(torch.randn(1, 40, 32))[0].square().sum()
    loss.backward()
    assert bool(mixture.gate.weight.grad.abs().max() < 1e-5 * loss) == blind


def test_what_is_derived():
    plain, added = tiny_config(), tiny_config(**PAPER)
    assert (plain.gating_residuals, plain.expert_capacity_factor, plain.load_balance_weights) == (False, 0.0, None)
    assert (added.gating_residuals, added.expert_capacity_factor) == (True, 1.1)
    assert plain.expert_shares == pytest.approx((1 / 3,) * 3)
    assert added.num_routed_experts == len(added.expert_shares) == ROUTED
