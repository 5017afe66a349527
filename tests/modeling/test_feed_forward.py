import pytest
import torch
import torch.nn.functional as F

from bamoe.modeling.feed_forward import MixtureOfFeedForward
from tests.modeling.conftest import tiny_config, tiny_model


def make_mixture(**changes) -> MixtureOfFeedForward:
    mixture = MixtureOfFeedForward(tiny_config(**changes))
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixture


def naive(mixture: MixtureOfFeedForward, hidden_states: torch.Tensor, normalise: bool, top_k: int) -> torch.Tensor:
    """Every token alone, every expert a plain SwiGLU."""
    output = torch.zeros_like(hidden_states)
    for b, t in torch.cartesian_prod(torch.arange(hidden_states.shape[0]), torch.arange(hidden_states.shape[1])):
        token = hidden_states[b, t]
        probabilities = torch.softmax(mixture.gate.weight @ token, 0)
        chosen = probabilities.argsort(descending=True)[:top_k]
        total = probabilities[chosen].sum() if normalise else 1.0
        for e in chosen:
            gate, up = (mixture.experts.gate_up_proj[e] @ token).chunk(2)
            expert = mixture.experts.down_proj[e] @ (F.silu(gate) * up)
            output[b, t] = output[b, t] + probabilities[e] / total * expert
    return output


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize(
    ("routing", "normalise", "top_k"),
    [
        ({"num_experts_per_tok": 1}, False, 1),
        ({"num_experts_per_tok": 2}, False, 2),
        ({"num_experts_per_tok": 2, "norm_topk_prob": True}, True, 2),
        ({"feed_forward_routing": "soft", "num_experts_per_tok": None}, False, 3),
    ],
    ids=["top1", "top2", "top2-normalised", "soft"],
)
def test_equals_a_loop_over_tokens_and_experts(backend, routing, normalise, top_k):
    mixture = make_mixture(experts_implementation=backend, **routing)
    hidden_states = torch.randn(2, 5, 32, requires_grad=True)
    output, logits, _ = mixture(hidden_states)
    expected = naive(mixture, hidden_states, normalise, top_k)
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-5)
    assert logits.shape == (10, 3)

    direction = torch.randn_like(output)
    inputs = [hidden_states, *mixture.parameters()]
    ours = torch.autograd.grad((output * direction).sum(), inputs)
    theirs = torch.autograd.grad((expected * direction).sum(), inputs)
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-4, atol=1e-5)


def test_output_scale_of_the_experts_count_keeps_the_function_of_identical_experts():
    """Top-1 with true probabilities, a uniform router and scale E: the gate is E · 1/E = 1."""
    mixture = make_mixture(num_experts_per_tok=1, routed_scaling_factor=3.0, experts_implementation="eager")
    torch.nn.init.zeros_(mixture.gate.weight)
    with torch.no_grad():
        mixture.experts.gate_up_proj[:] = mixture.experts.gate_up_proj[0].clone()
        mixture.experts.down_proj[:] = mixture.experts.down_proj[0].clone()
    hidden_states = torch.randn(1, 4, 32)
    gate, up = F.linear(hidden_states, mixture.experts.gate_up_proj[0]).chunk(2, -1)
    assert torch.allclose(
        mixture(hidden_states)[0], F.linear(F.silu(gate) * up, mixture.experts.down_proj[0]), atol=1e-6
    )


@pytest.fixture
def grouped_calls(monkeypatch):
    """Counts the grouped matrix products."""
    calls, kernel = [], F.grouped_mm

    def counted(*arguments, **options):
        calls.append(arguments)
        return kernel(*arguments, **options)

    monkeypatch.setattr(F, "grouped_mm", counted)
    return calls


def test_grouped_mm_is_the_default_and_really_runs(grouped_calls):
    model = tiny_model()
    assert model.config._experts_implementation == "grouped_mm"
    model(torch.randint(3, 64, (1, 6)))
    assert len(grouped_calls) == 2 * model.config.num_hidden_layers  # up and down


@pytest.mark.parametrize(("width", "dtype", "grouped"), [(48, torch.float32, 4), (46, torch.float32, 0)])
def test_a_size_the_kernel_cannot_run_falls_back(grouped_calls, width, dtype, grouped):
    model = tiny_model(intermediate_size=width)
    tokens = torch.randint(3, 64, (1, 6))
    with torch.no_grad():
        logits = model.to(dtype)(tokens).logits
        model.set_experts_implementation("eager")
        assert torch.allclose(logits, model(tokens).logits, rtol=1e-5, atol=1e-6)
    assert len(grouped_calls) == grouped


def test_the_decision_follows_the_dtype_of_the_call(grouped_calls):
    """Width 44 is a multiple of 16 bytes in float32 and not in bfloat16."""
    model = tiny_model(intermediate_size=44)
    tokens = torch.randint(3, 64, (1, 2))
    with torch.no_grad():
        model(tokens)
        assert len(grouped_calls) == 4
        model.bfloat16()(tokens)
    assert len(grouped_calls) == 4
