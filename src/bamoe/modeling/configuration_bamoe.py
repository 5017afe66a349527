"""The configuration of a BAM mixture: what a dense decoder is, plus how its experts are laid out and routed."""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_bamoe.BamoeConfig",
    "AutoModel": "modeling_bamoe.BamoeModel",
    "AutoModelForCausalLM": "modeling_bamoe.BamoeForCausalLM",
}

_NAMES_ELSEWHERE = {
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
    "moe_num_experts": "num_experts",
    "moe_intermediate_size": "intermediate_size",
    "moe_top_k": "num_experts_per_tok",
    "top_k_experts": "num_experts_per_tok",
    "num_kv_heads": "num_key_value_heads",
    "layer_norm_eps": "norm_eps",
    "layernorm_epsilon": "norm_eps",
    "aux_loss_coef": "router_aux_loss_coef",
    "z_loss_coef": "router_z_loss_coef",
    "norm_topk": "norm_topk_prob",
    "use_qk_norm": "qk_norm",
}


class BamoeConfig(PreTrainedConfig):
    r"""Configuration of `BamoeModel`.

    Heads are counted as they are computed and cached, over all attention experts, so that every tool that sizes a
    KV cache from a config is right. With A attention experts branched from a dense model of H query and J key/value
    heads: `num_attention_heads` = A·H, and `num_key_value_heads` = A·J with KV experts, J with KV sharing.

    Dense decoder:
        vocab_size, hidden_size, num_hidden_layers, head_dim, hidden_act, tie_word_embeddings, rope_parameters,
        max_position_embeddings, sliding_window, layer_types, attention_dropout, initializer_range: as in Llama.
        intermediate_size: width F of one feed-forward expert (SwiGLU: gate and up are F wide each).
        use_parallel_block: one norm; attention and feed-forward read the same input (the paper's block). False: two
            norms, feed-forward after attention.
        norm_type: "rms_norm", or "layer_norm" (mean-centred, no bias: Cohere).
        norm_eps: epsilon of every norm.
        qk_norm: None; "expert" (one weight vector per expert, shared by its heads, RMS: Qwen3) or "head" (one weight
            vector per head, mean-centred: Cohere).
        attention_bias: biases on the query, key and value projections.
        attention_output_bias: one output bias per attention expert, mixed by the gate.
        rope_interleaved: rotary pairs are neighbours (Cohere) instead of halves (Llama).
        logit_scale: factor on the logits.

    Mixture of attention:
        num_attention_experts: A; 1 is plain attention with no router.
        attention_key_value: "experts" (each expert has its keys and values) or "shared".
        attention_routing: "soft" (all experts, gates sum to 1) or "top_k".
        num_attention_experts_per_tok: k of top-k attention routing; None with soft routing.
        attention_norm_topk_prob: gates of the selected attention experts sum to 1.

    Mixture of feed-forward experts:
        num_experts: E.
        feed_forward_routing: "top_k" or "soft" (all experts, gates sum to 1).
        num_experts_per_tok: k; None with soft routing.
        norm_topk_prob: gates of the selected experts sum to 1.
        routed_scaling_factor: factor on the feed-forward gates. With k = 1 and true probabilities, E makes the
            mixture of identical experts function-preserving at a uniform router.

    Router losses, added while training:
        router_aux_loss_coef: load balance (Switch Transformer, eq. 4; BAM, section 3), 1 per layer when uniform.
        router_z_loss_coef: mean squared log-sum-exp of the router logits (ST-MoE, eq. 5).
        output_router_logits: return router logits from every forward.

    Raises:
        ValueError: a value that no model can be built from, or a key that looks like a misspelt one.
    """

    model_type = "bamoe"
    keys_to_ignore_at_inference = ["past_key_values", "router_logits", "attention_router_logits"]  # noqa: RUF012
    # Tensor parallelism gives a process a run of whole heads and a slice of every feed-forward expert; expert
    # parallelism gives it whole feed-forward experts. Routers, norms and output biases are on every process.
    base_model_tp_plan = {  # noqa: RUF012
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.local_heads": "local_heads",  # ours: parallel.py
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {  # noqa: RUF012
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_attention_heads: int = 32
    # None stands for the value that __post_init__ derives.
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    rope_interleaved: bool = False
    sliding_window: int | None = None
    layer_types: list[str] = None  # type: ignore[assignment]
    attention_dropout: float = 0.0
    use_parallel_block: bool = False
    norm_type: str = "rms_norm"
    norm_eps: float = 1e-6
    qk_norm: str | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    logit_scale: float = 1.0

    num_attention_experts: int = 4
    attention_key_value: str = "experts"
    attention_routing: str = "soft"
    num_attention_experts_per_tok: int | None = None
    attention_norm_topk_prob: bool = False

    num_experts: int = 4
    feed_forward_routing: str = "top_k"
    num_experts_per_tok: int | None = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_misspelt(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            # With heads counted over all experts, hidden_size // num_attention_heads would be wrong.
            self.head_dim = self.hidden_size * self.num_attention_experts // self.num_attention_heads
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        self._validate()
        # Saving registers only the class that is saved; a language model's directory serves AutoModel as well.
        self.auto_map = kwargs.pop("auto_map", None) or dict(AUTO_MAP)
        super().__post_init__(**kwargs)

    @property
    def num_dense_heads(self) -> int:
        """H, the query heads of one attention expert."""
        return self.num_attention_heads // self.num_attention_experts

    @property
    def num_dense_key_value_heads(self) -> int:
        """J, the key/value heads that one attention expert reads."""
        shared = self.attention_key_value == "shared"
        return self.num_key_value_heads if shared else self.num_key_value_heads // self.num_attention_experts

    @property
    def num_key_value_experts(self) -> int:
        """Attention experts with keys and values of their own: A, or 1 with KV sharing."""
        return 1 if self.attention_key_value == "shared" else self.num_attention_experts

    @property
    def task_blind_routers(self) -> tuple[str, ...]:
        """Routers whose gates are always 1 (top-1, renormalised), so that the task loss cannot train them."""
        feed_forward = self.norm_topk_prob and self.num_experts_per_tok == 1 < self.num_experts
        attention = (
            self.attention_norm_topk_prob and self.num_attention_experts_per_tok == 1 < self.num_attention_experts
        )
        return ("mlp.gate",) * feed_forward + ("self_attn.gate",) * attention

    def _refuse_misspelt(self, kwargs: dict[str, Any]) -> None:
        # transformers turns unknown keywords into attributes, so a typo, or another architecture's name for the same
        # thing, would silently keep the default.
        known = [field.name for field in fields(self)]
        for key in kwargs:
            if key.startswith("_") or key.endswith("_token_id"):
                continue
            meant = _NAMES_ELSEWHERE.get(key) or next(
                iter(difflib.get_close_matches(key, known, n=1, cutoff=0.8)), None
            )
            if meant is not None:
                raise ValueError(f"BamoeConfig has no {key!r}; did you mean {meant!r}?")

    def _validate(self) -> None:
        choices = {
            "norm_type": ("rms_norm", "layer_norm"),
            "qk_norm": (None, "expert", "head"),
            "attention_key_value": ("experts", "shared"),
            "attention_routing": ("soft", "top_k"),
            "feed_forward_routing": ("top_k", "soft"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {valid}, found {getattr(self, name)!r}")
        positive = (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "num_attention_experts", "num_experts"),
        )
        for name in positive:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, found {value!r}")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is not among the {self.vocab_size} tokens")
        self._validate_heads()
        self._validate_routing("feed_forward_routing", "num_experts_per_tok", "num_experts")
        self._validate_routing("attention_routing", "num_attention_experts_per_tok", "num_attention_experts")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types must name {self.num_hidden_layers} layers, found {self.layer_types}")
        unknown = set(self.layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise ValueError(f"layer_types must be full_attention or sliding_attention, found {sorted(unknown)}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention but sliding_window is None")

    def _validate_heads(self) -> None:
        key_value_experts = self.num_key_value_experts
        for name, heads, experts in (
            ("num_attention_heads", self.num_attention_heads, self.num_attention_experts),
            ("num_key_value_heads", self.num_key_value_heads, key_value_experts),
        ):
            if heads % experts:
                raise ValueError(f"{name} ({heads}) counts all experts, so it must divide by {experts}")
        if self.num_dense_heads % self.num_dense_key_value_heads:
            raise ValueError(
                f"each attention expert has {self.num_dense_heads} query heads, which do not divide into "
                f"{self.num_dense_key_value_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, found {self.head_dim}")

    def _validate_routing(self, routing: str, selected: str, experts: str) -> None:
        k, count = getattr(self, selected), getattr(self, experts)
        if getattr(self, routing) == "soft":
            if k is not None and k != count:
                raise ValueError(f"{routing} is soft: all {count} experts run, so leave {selected} out (found {k})")
            setattr(self, selected, None)
        elif isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= count:
            raise ValueError(f"{selected} must be between 1 and {experts} ({count}), found {k!r}")


def task_blind_message(routers: Sequence[str]) -> str:
    """Why top-1 renormalised routers learn nothing, and what to choose instead."""
    scale = "soft routing" if "self_attn.gate" in routers else "routed_scaling_factor = number of experts"
    return (
        f"{' and '.join(routers)}: with one expert per token and renormalised gates every gate is 1, so the task gives "
        f"the router no gradient. Use true probabilities (no renormalisation), which with {scale} keeps the function "
        "of identical experts, or select two experts."
    )


__all__ = ["AUTO_MAP", "BamoeConfig", "task_blind_message"]
