"""What the encoder and the encoder-decoder of MoA have in their configuration: the original Transformer's trunk."""

from collections.abc import Mapping
from dataclasses import fields
from typing import ClassVar

from transformers.activations import ACT2FN

from .configuration_attention import AttentionExpertsConfig
from .configuration_bamoe import BamoeConfig
from .configuration_checks import FLAG, NOT_NEGATIVE, POSITIVE_INTEGER, SHARE, Check, one_of


class TransformerMixtureConfig(AttentionExpertsConfig):
    r"""Fields of a Transformer (Vaswani et al., 2017) with mixtures of attention heads in place of its multi-head
    attention (MoA, section 3); the mixture of attention is described at `AttentionExpertsConfig`.

    The defaults are MoA's 8K16E128D: 16 experts of one head of 128, 8 selected, one key and value head for all. With
    `num_attention_experts` = 1 and `num_attention_heads` = 8 it is the dense Transformer that MoA is compared with.

        num_hidden_layers: layers (of the encoder).
        intermediate_size: width of the one feed-forward, which is not a mixture.
        hidden_act: of the feed-forward.
        norm_first: normalise what a layer reads (and the last layer's output), instead of each sum with the residual
            stream, as the Transformer does.
        norm_eps: epsilon of every LayerNorm.
        dropout: of the embeddings and of what is added to the residual stream; attention_dropout: of attention weights.
        tie_word_embeddings: one table for all embeddings and the head.
        max_position_embeddings: longest sequence; sinusoids have no parameters.
        initializer_range: standard deviation of projections and embeddings; None is 1/√hidden_size, Glorot's for a
            square projection. (The 0.02 of larger models leaves a narrow one unable to learn to attend.)
        router_initializer_range: standard deviation of routers' weights. Small, so that the selected heads start with
            about equal gates: with 1/√hidden_size, a mixture of many heads learns much more slowly (docs/moa.md).
        num_key_value_heads: None is one per query head of an expert (that is, one for experts of one head), or with
            attention_key_value "experts", of all experts.
        head_dim: None is that of the dense model for one expert, hidden_size / num_attention_heads; else twice
            hidden_size over the number of heads that a token uses, which costs what the dense model costs (MoA base).
        num_attention_experts_per_tok: None is 8 of top-k routing, or all if there are fewer.
    """

    checks: ClassVar[Mapping[str, Check]] = {
        **AttentionExpertsConfig.checks,
        "num_hidden_layers": POSITIVE_INTEGER,
        "hidden_act": one_of(*sorted(ACT2FN)),
        "norm_first": FLAG,
        "norm_eps": NOT_NEGATIVE,
        "dropout": SHARE,
        "tie_word_embeddings": FLAG,
    }
    foreign_fields: ClassVar[tuple[str, ...]] = tuple(field.name for field in fields(BamoeConfig))
    foreign_because: ClassVar[str] = (
        "it belongs to BamoeConfig; the feed-forward of this architecture is one dense layer, its positions are "
        "sinusoids, and its block is the original Transformer's"
    )

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    num_attention_experts: int = 16
    attention_key_value: str = "shared"
    attention_routing: str = "top_k"
    attention_bias: bool = True
    attention_output_bias: bool = True
    hidden_act: str = "relu"
    norm_first: bool = False
    norm_eps: float = 1e-5
    dropout: float = 0.1
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 1024
    initializer_range: float = None  # type: ignore[assignment]  # derived
    router_initializer_range: float | None = 0.02

    def refuse_longer(self, length: int) -> None:
        """Raise ValueError for a sequence of more tokens than there are positions."""
        longest = self.max_position_embeddings
        if length > longest:
            raise ValueError(
                f"a sequence of {length} tokens is longer than max_position_embeddings ({longest}); cut it, or raise "
                "max_position_embeddings, which adds no parameters (positions that were not trained may be poor)"
            )

    def _complete(self) -> None:
        experts, k = self.num_attention_experts, self.num_attention_experts_per_tok
        if k is None and self.attention_routing == "top_k":
            k = self.num_attention_experts_per_tok = min(8, experts)
        # What does not divide, or is out of range, is refused by name afterwards.
        per_expert = max(self.num_attention_heads // experts, 1)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = per_expert if self.attention_key_value == "shared" else self.num_attention_heads
        if self.head_dim is None:
            used = max(k or experts, 1) * per_expert
            self.head_dim = (1 if experts == 1 else 2) * self.hidden_size // used
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5

    def _validate(self) -> None:
        super()._validate()
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size must be even for sinusoidal positions, found {self.hidden_size}")


__all__ = ["TransformerMixtureConfig"]
