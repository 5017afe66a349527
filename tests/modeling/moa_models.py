"""Tiny encoders and encoder-decoders, and torch's Transformer layers with their weights."""

from typing import Any

import torch
from torch import nn

from bamoe.modeling import (
    BamoeEncoderConfig,
    BamoeEncoderDecoderConfig,
    BamoeForConditionalGeneration,
    BamoeForMaskedLM,
)
from bamoe.modeling.attention import MixtureOfAttention
from bamoe.modeling.transformer_blocks import DecoderLayer, EncoderLayer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "initializer_range": 0.2,
    "router_initializer_range": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
SPARSE = {"num_attention_experts": 6, "num_attention_heads": 6, "num_attention_experts_per_tok": 2}
DENSE = {"num_attention_experts": 1, "num_attention_heads": 4, "num_attention_experts_per_tok": None}


def randomised(model: Any) -> Any:
    """In evaluation mode, every parameter random, norms and biases included."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def masked_lm(**changes: Any) -> BamoeForMaskedLM:
    return randomised(BamoeForMaskedLM(BamoeEncoderConfig(**(SIZES | SPARSE | changes))))


def translator(**changes: Any) -> BamoeForConditionalGeneration:
    """Two encoder layers and three decoder layers."""
    settings = SIZES | SPARSE | {"num_decoder_layers": 3, "decoder_start_token_id": 2} | changes
    return randomised(BamoeForConditionalGeneration(BamoeEncoderDecoderConfig(**settings)))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def silent_parameters(model: nn.Module) -> list[str]:
    """Parameters without a gradient; a key's bias never has one, for it shifts all scores of a query alike."""
    return [
        name
        for name, parameter in model.named_parameters()
        if "k_proj.bias" not in name and (parameter.grad is None or not parameter.grad.any())
    ]


def checkpoint_gradients(model: Any, reentrant: bool) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def torch_attention(attention: MixtureOfAttention) -> dict[str, torch.Tensor]:
    """The weights of nn.MultiheadAttention that make it one attention expert."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return {
        "in_proj_weight": torch.cat([each.weight for each in projections]),
        "in_proj_bias": torch.cat([each.bias for each in projections]),
        "out_proj.weight": attention.o_proj.weight,
        "out_proj.bias": attention.output_bias[0],
    }


def torch_layer(layer: EncoderLayer | DecoderLayer) -> nn.Module:
    """The same layer, of one attention expert, by torch."""
    across = isinstance(layer, DecoderLayer)
    kind = nn.TransformerDecoderLayer if across else nn.TransformerEncoderLayer
    config = layer.self_attn.config
    reference = kind(
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        dropout=0.0,
        activation=nn.functional.relu,
        layer_norm_eps=config.norm_eps,
        batch_first=True,
        norm_first=config.norm_first,
    )
    norms = [layer.self_attn_layer_norm, *([layer.encoder_attn_layer_norm] if across else []), layer.final_layer_norm]
    weights = {f"self_attn.{name}": value for name, value in torch_attention(layer.self_attn).items()}
    if across:
        weights |= {f"multihead_attn.{name}": value for name, value in torch_attention(layer.encoder_attn).items()}
    for parameter in ("weight", "bias"):
        weights |= {f"norm{i}.{parameter}": getattr(norm, parameter) for i, norm in enumerate(norms, start=1)}
        weights |= {f"linear{i}.{parameter}": getattr(getattr(layer.mlp, f"fc{i}"), parameter) for i in (1, 2)}
    reference.load_state_dict(weights)
    return reference.eval()


def naive_positions(length: int, width: int) -> torch.Tensor:
    """Sines and cosines as the Transformer's section 3.5 has them, entry by entry."""
    table = torch.zeros(length, width, dtype=torch.float64)
    for position in range(length):
        for channel in range(width):
            angle = torch.tensor(position / 10000 ** ((channel - channel % 2) / width), dtype=torch.float64)
            table[position, channel] = angle.cos() if channel % 2 else angle.sin()
    return table.float()


def naive_router_losses(logits: torch.Tensor, top_k: int) -> tuple[float, float]:
    """MoA's load-balance and z losses of one router, token by token, from its logits (tokens, experts)."""
    experts = logits.shape[1]
    chosen, probability, squares = [0.0] * experts, [0.0] * experts, []
    for row in logits.double():
        probabilities = row.softmax(0)
        for expert in probabilities.argsort(descending=True)[:top_k].tolist():
            chosen[expert] += 1
        for expert in range(experts):
            probability[expert] += probabilities[expert].item()
        squares.append(row.logsumexp(0).item() ** 2)
    shares = zip(chosen, probability, strict=True)
    balance = experts * sum(f / sum(chosen) * p / sum(probability) for f, p in shares)
    return balance, sum(squares) / len(squares)
