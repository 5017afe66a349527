"""What the attention routers of an encoder, or of an encoder and a decoder, do over a text in batches with padding.

A text of a decoder alone is read by `perplexity.evaluate_streams`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bamoe.evaluation.routing import LayerRouting, RouterStatistics, router_statistics
from bamoe.evaluation.specialization import LayerSpecialization, TokenAssignments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Which output has a kind's router logits, which input the tokens that were routed.
_ROUTERS = {
    "attention": ("attention_router_logits", "input_ids"),
    "encoder": ("encoder_attention_router_logits", "input_ids"),
    "decoder": ("decoder_attention_router_logits", "decoder_input_ids"),
    "cross": ("cross_attention_router_logits", "decoder_input_ids"),
}
# The input in which padding is told from tokens, and the value it has there.
_PADDING = {"input_ids": ("attention_mask", 0), "decoder_input_ids": ("labels", -100)}


@dataclass(frozen=True)
class AttentionHeads:
    """`routing[kind][layer]` and `specialization[kind][layer]` of one text; both are empty for a dense model."""

    routing: dict[str, list[LayerRouting]]
    specialization: dict[str, list[LayerSpecialization]]


@torch.no_grad()
def attention_heads(
    model: PreTrainedModel, batches: Sequence[Mapping[str, torch.Tensor]], tokenizer: PreTrainedTokenizerBase
) -> AttentionHeads:
    """Run a model over a text and count what its routers choose. The model's mode is left as it was.

    Args:
        model: a masked language model, or an encoder-decoder (which routes the tokens of its decoder's input twice, in
            self-attention and in cross-attention, each by the query).
        batches: the model's arguments; (B, T) each, padding as `attention_mask` 0 and as `labels` -100.
    """
    config = model.config
    occurrences = {
        name: sum(np.bincount(_tokens(batch, name).numpy(), minlength=config.vocab_size) for batch in batches)
        for name in _PADDING
        if name in batches[0]
    }
    statistics: dict[str, RouterStatistics] = {}
    counted: dict[str, TokenAssignments] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            arguments: dict[str, Any] = {name: values.to(model.device) for name, values in batch.items()}
            outputs = model(**arguments, output_router_logits=True)
            for kind, (name, ids) in _ROUTERS.items():
                if not (logits := getattr(outputs, name, None)):
                    continue
                if kind not in statistics:
                    statistics[kind] = router_statistics(config)["attention"]
                    counted[kind] = TokenAssignments(np.asarray(occurrences[ids]), statistics[kind].top_k)
                real = _is_token(batch, ids).flatten().to(model.device)
                kept = [layer[real] for layer in logits]
                statistics[kind].update(kept)
                counted[kind].update(_tokens(batch, ids), kept)
    finally:
        model.train(was_training)
    routing = {kind: found.layers() for kind, found in statistics.items()}
    return AttentionHeads(
        routing=routing,
        specialization={kind: found.layers([routing[kind]], tokenizer) for kind, found in counted.items()},
    )


def _is_token(batch: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    marks, padding = _PADDING[name]
    return batch[marks] != padding if marks in batch else torch.ones_like(batch[name], dtype=torch.bool)


def _tokens(batch: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    return batch[name][_is_token(batch, name)]
