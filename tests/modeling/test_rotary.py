"""Rotary positions against transformers' own."""

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from bamoe.modeling.rotary import apply_rotary_pos_emb


def angles(batch, length, width):
    """Cosines and sines with two halves of their own, so that none is taken for the other."""
    halves = torch.rand(batch, length, width, generator=torch.Generator().manual_seed(0))
    return halves.cos(), halves.sin()


def heads(batch, count, length, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, count, width, generator=generator).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("batch", [1, 2])  # of the angles
@pytest.mark.parametrize("interleaved", [False, True])
def test_values_and_gradients_are_those_of_transformers(interleaved, batch):
    query, key = heads(2, 6, 5, 8, 1), heads(2, 3, 5, 8, 2)
    cosine, sine = angles(batch, 5, 8)
    twin = modeling_cohere if interleaved else modeling_llama
    found = apply_rotary_pos_emb(query, key, cosine, sine, interleaved)
    expected = twin.apply_rotary_pos_emb(query, key, cosine, sine)
    for ours, theirs, given in zip(found, expected, (query, key), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
        weights = torch.randn_like(ours)
        (gradient,) = torch.autograd.grad((ours * weights).sum(), given)
        (expected_gradient,) = torch.autograd.grad((theirs * weights).sum(), given)
        assert torch.allclose(gradient, expected_gradient, atol=1e-6)


def test_gradients_of_gradients():
    cosine, sine = (each.double() for each in angles(1, 3, 4))
    query, key = (each.detach().double().requires_grad_() for each in (heads(1, 2, 3, 4, 1), heads(1, 1, 3, 4, 2)))

    def run(query, key):
        return tuple(each.square() for each in apply_rotary_pos_emb(query, key, cosine, sine, False))

    assert torch.autograd.gradcheck(run, (query, key))
    assert torch.autograd.gradgradcheck(run, (query, key))


def test_mixed_types_are_promoted_as_by_transformers():
    query, key = (each.detach().bfloat16() for each in (heads(1, 2, 3, 8, 1), heads(1, 2, 3, 8, 2)))
    found = apply_rotary_pos_emb(query, key, *angles(1, 3, 8), False)
    expected = modeling_llama.apply_rotary_pos_emb(query, key, *angles(1, 3, 8))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert found[0].dtype == torch.float32
