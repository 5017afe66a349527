"""The loss without logits against the usual one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bamoe.modeling import BamoeConfig, BamoeForCausalLM
from bamoe.modeling import linear_cross_entropy as module
from bamoe.modeling.linear_cross_entropy import linear_cross_entropy

VOCABULARY = 97


def model(**changes) -> BamoeForCausalLM:
    torch.manual_seed(0)
    config = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_experts": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    return BamoeForCausalLM(BamoeConfig(**config | changes)).train()


def labelled() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = labels[2, 7] = -100
    return ids, labels


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("held", [1, 10 * VOCABULARY, 10**9], ids=["row by row", "in blocks", "at once"])
def test_value_and_gradients(monkeypatch, held):
    monkeypatch.setattr(module, "HELD_LOGITS", held)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 16, generator=generator).requires_grad_() for rows in (23, VOCABULARY))
    targets = torch.randint(VOCABULARY, (23,), generator=generator)
    targets[[0, 7, 22]] = -100
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    found = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(0.3 * expected, (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(0.3 * found, (hidden, weight)), wanted)


def test_only_what_is_trained_gets_a_gradient():
    hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(VOCABULARY, 16)
    targets = torch.arange(5)
    linear_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is None
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets, reduction="sum"))


@pytest.mark.parametrize("arguments", [{}, {"num_items_in_batch": torch.tensor(40)}, {"shifted": True}], ids=str)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "logit_scale": 0.25}], ids=["", "tied, scaled"])
def test_a_models_loss_is_the_same(changes, arguments):
    usual = model(**changes)
    ids, labels = labelled()
    given = dict(arguments)
    if given.pop("shifted", False):
        given["shift_labels"] = labels.roll(-1, 1)
    without = copy.deepcopy(usual)
    expected = usual(input_ids=ids, labels=labels, **given)
    found = without(input_ids=ids, labels=labels, skip_logits=True, **given)
    assert found.logits is None
    assert expected.logits is not None
    torch.testing.assert_close(found.loss, expected.loss)
    for output in (expected, found):
        output.loss.backward()
    torch.testing.assert_close(gradients(without), gradients(usual))


def test_evaluation_and_bfloat16():
    usual = model().eval()
    ids, labels = labelled()
    with torch.no_grad():
        torch.testing.assert_close(
            usual(input_ids=ids, labels=labels, skip_logits=True).loss, usual(input_ids=ids, labels=labels).loss
        )
    usual.train()
    without = copy.deepcopy(usual)
    losses = []
    for each, skip in ((usual, False), (without, True)):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(each(input_ids=ids, labels=labels, skip_logits=skip).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gradients(without), gradients(usual), rtol=0.05, atol=2e-3)


def test_a_head_that_is_more_than_a_product_keeps_working():
    hooked = model()
    ids, labels = labelled()
    expected = hooked(input_ids=ids, labels=labels).loss
    called = []
    hooked.lm_head.register_forward_hook(lambda *_: called.append(True))
    found = hooked(input_ids=ids, labels=labels, skip_logits=True)
    assert called
    assert found.logits is None
    torch.testing.assert_close(found.loss, expected)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


def test_logits_of_a_batch_never_exist(monkeypatch):
    monkeypatch.setattr(module, "HELD_LOGITS", 4 * 4096)
    wide = model(vocab_size=4096, hidden_size=8)
    ids = torch.randint(4096, (4, 64))
    with Largest() as usual:
        wide(input_ids=ids, labels=ids).loss.backward()
    with Largest() as without:
        wide(input_ids=ids, labels=ids, skip_logits=True).loss.backward()
    assert usual.elements == 4 * 64 * 4096
    assert without.elements <= usual.elements / 16
