"""The independent oracle: transformers' own dense layers run expert by expert, outputs mixed by the gates.

Nothing of bamoe is used here but the router weights that are handed in.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel


def mean_module(modules: Sequence[nn.Module]) -> nn.Module:
    """A copy of the first module with the mean of all modules' parameters."""
    merged = copy.deepcopy(modules[0])
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter.copy_(torch.stack([module.get_parameter(name).double() for module in modules]).mean(0))
    return merged


class ReferenceMixture(nn.Module):
    """A BAM or BTX mixture as a loop over dense models.

    Args:
        dense: the dense models, one per expert seat.
        attention_gates, feed_forward_gates: one router weight (experts, D) per layer; no attention gates for BTX,
            whose attention is the mean of the models'.
        share_key_value: keys and values (with their biases and norms) are the mean of the models'.
        top_k: feed-forward experts per token. normalise: their gates sum to 1.
    """

    def __init__(
        self,
        dense: Sequence[PreTrainedModel],
        attention_gates: Sequence[torch.Tensor] | None,
        feed_forward_gates: Sequence[torch.Tensor],
        share_key_value: bool,
        top_k: int,
        normalise: bool,
    ):
        super().__init__()
        self.config = dense[0].config
        self.dense = nn.ModuleList([copy.deepcopy(model) for model in dense])
        self.embed = mean_module([model.model.embed_tokens for model in dense])
        self.norm = mean_module([model.model.norm for model in dense])
        self.head = mean_module([model.lm_head for model in dense])
        self.attention_gates, self.feed_forward_gates = attention_gates, feed_forward_gates
        self.top_k, self.normalise = top_k, normalise
        self.layers = nn.ModuleList()
        for n in range(self.config.num_hidden_layers):
            originals = [model.model.layers[n] for model in dense]
            copies = [copy.deepcopy(layer) for layer in originals]
            if attention_gates is None:
                shared = mean_module([layer.self_attn for layer in originals])
                for layer in copies:
                    layer.self_attn = shared
            elif share_key_value:
                for part in ("k_proj", "v_proj", "k_norm"):
                    if hasattr(originals[0].self_attn, part):
                        merged = mean_module([getattr(layer.self_attn, part) for layer in originals])
                        for layer in copies:
                            setattr(layer.self_attn, part, merged)
            for part in ("input_layernorm", "post_attention_layernorm"):
                if hasattr(originals[0], part):
                    merged = mean_module([getattr(layer, part) for layer in originals])
                    for layer in copies:
                        setattr(layer, part, merged)
            self.layers.append(nn.ModuleList(copies))

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Logits of inputs_embeds (B, T, D)."""
        length = inputs_embeds.shape[1]
        rope = self.dense[0].model.rotary_emb(inputs_embeds, torch.arange(length)[None])
        hidden = inputs_embeds
        for n, experts in enumerate(self.layers):
            mask = self._mask(length, experts[0].self_attn)
            normed = experts[0].input_layernorm(hidden)
            attended = self._attention(n, experts, normed, rope, mask)
            if hasattr(experts[0], "post_attention_layernorm"):
                hidden = hidden + attended
                hidden = hidden + self._feed_forward(n, experts, experts[0].post_attention_layernorm(hidden))
            else:
                hidden = hidden + attended + self._feed_forward(n, experts, normed)
        return self.head(self.norm(hidden)) * getattr(self.config, "logit_scale", 1.0)

    def _attention(self, n, experts, normed, rope, mask):
        if self.attention_gates is None:
            return experts[0].self_attn(normed, position_embeddings=rope, attention_mask=mask)[0]
        gates = torch.softmax(normed @ self.attention_gates[n].T, -1)
        outputs = [layer.self_attn(normed, position_embeddings=rope, attention_mask=mask)[0] for layer in experts]
        return sum(gates[..., i, None] * output for i, output in enumerate(outputs))

    def _feed_forward(self, n, experts, normed):
        probabilities = torch.softmax(normed @ self.feed_forward_gates[n].T, -1)
        threshold = probabilities.sort(descending=True).values[..., self.top_k - 1, None]
        gates = probabilities * (probabilities >= threshold)
        if self.normalise:
            gates = gates / gates.sum(-1, keepdim=True)
        return sum(gates[..., i, None] * layer.mlp(normed) for i, layer in enumerate(experts))

    @staticmethod
    def _mask(length: int, attention: nn.Module) -> torch.Tensor:
        """Causal, and limited to the layer's window where it has one."""
        distance = torch.arange(length)[:, None] - torch.arange(length)
        allowed = distance >= 0
        window = getattr(attention, "sliding_window", None)
        if window is None and attention.config.model_type == "mistral":
            window = attention.config.sliding_window
        if window is not None:
            allowed &= distance < window
        return torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
