"""What every architecture with a mixture of attention has in its configuration: heads, experts, routing, losses."""

import difflib
from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

GATE_NORMS = ("none", "detached", "topk_softmax")

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
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "encoder_ffn_dim": "intermediate_size",
    "encoder_layers": "num_hidden_layers",
    "decoder_layers": "num_decoder_layers",
    "encoder_attention_heads": "num_attention_heads",
    "decoder_attention_heads": "num_attention_heads",
    "activation_function": "hidden_act",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}


class AttentionExpertsConfig(PreTrainedConfig):
    r"""Fields of a model whose attention is a mixture of experts (BAM, section 3; MoA, section 3).

    Heads are counted over all attention experts, so that every tool that sizes a KV cache from a config is right. With
    A experts of H query and J key/value heads each: `num_attention_heads` = A·H, and `num_key_value_heads` = A·J with
    KV experts, J with KV sharing. Top-k routing computes k·H of the query heads per token.

        num_attention_experts: A; 1 is plain attention with no router.
        attention_key_value: "experts" (each expert has its keys and values) or "shared".
        attention_routing: "soft" (all experts, gates sum to 1) or "top_k".
        num_attention_experts_per_tok: k of top-k attention routing; None with soft routing.
        attention_gate_norm: gates of the k selected experts, from the softmax p over all A: "detached", p_i over the
            sum of the selected p, through which no gradient flows (MoA, section 3.1); "none", p_i; "topk_softmax", the
            same values as "detached" with the gradient of the whole. None with soft routing.
        attention_bias: biases on the query, key and value projections.
        attention_output_bias: one output bias per attention expert, mixed by the gate.
        router_aux_loss_coef, router_z_loss_coef: of the load-balance and z losses, added while training.
        output_router_logits: return router logits from every forward.

    Raises:
        ValueError: a value that no model can be built from, or a key that looks like a misspelt one.
    """

    default_auto_map: ClassVar[dict[str, str]] = {}
    sized_by: ClassVar[tuple[str, ...]] = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "num_attention_experts"),
    )

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2048
    num_attention_heads: int = 32
    # None stands for the value that __post_init__ derives.
    num_key_value_heads: int = None  # type: ignore[assignment]
    head_dim: int = None  # type: ignore[assignment]
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    attention_dropout: float = 0.0
    attention_bias: bool = False
    attention_output_bias: bool = False

    num_attention_experts: int = 4
    attention_key_value: str = "experts"
    attention_routing: str = "soft"
    num_attention_experts_per_tok: int | None = None
    attention_gate_norm: str | None = None

    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001
    output_router_logits: bool = False

    # An architecture that has these makes fields of them.
    qk_norm: ClassVar[str | None] = None
    rope_interleaved: ClassVar[bool] = False

    def __post_init__(self, **kwargs: Any) -> None:
        renormalised = kwargs.pop("attention_norm_topk_prob", None)  # what mixtures of version 0.1 call it
        self._refuse_misspelt(kwargs)
        if self.attention_gate_norm is None and self.attention_routing == "top_k":
            self.attention_gate_norm = {None: "detached", False: "none", True: "topk_softmax"}[renormalised]
        self._complete()
        self._validate()
        # Saving registers only the class that is saved; the directory of a model with a head serves the others as well.
        self.auto_map = kwargs.pop("auto_map", None) or dict(self.default_auto_map)
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
        """Routers whose gates have no gradient from the task: always 1 (top-1, the whole normalised)."""
        one_of_several = self.num_attention_experts_per_tok == 1 < self.num_attention_experts
        return ("self_attn.gate",) * (one_of_several and self.attention_gate_norm == "topk_softmax")

    def window_of(self, layer_idx: int) -> int | None:
        """Tokens that attention of a layer looks back at most; None for all."""
        return None

    def _complete(self) -> None:
        """Fill in what is derived."""
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            # With heads counted over all experts, hidden_size // num_attention_heads would be wrong.
            self.head_dim = self.hidden_size * self.num_attention_experts // self.num_attention_heads

    def _refuse_misspelt(self, kwargs: dict[str, Any]) -> None:
        # transformers turns unknown keywords into attributes, so a typo, or another architecture's name for the same
        # thing, would silently keep the default.
        known = [field.name for field in fields(self)]
        for key in kwargs:
            if key.startswith("_") or key.endswith("_token_id"):
                continue
            elsewhere = _NAMES_ELSEWHERE.get(key)
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
            meant = elsewhere if elsewhere in known else next(iter(close), None)
            if meant is not None:
                raise ValueError(f"{type(self).__name__} has no {key!r}; did you mean {meant!r}?")

    def _validate(self) -> None:
        self._validate_choices(
            {
                "attention_key_value": ("experts", "shared"),
                "attention_routing": ("soft", "top_k"),
                "attention_gate_norm": GATE_NORMS if self.attention_routing == "top_k" else (None,),
            }
        )
        for name in self.sized_by:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, found {value!r}")
        if self.pad_token_id is not None and not -self.vocab_size <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id {self.pad_token_id} is not among the {self.vocab_size} tokens")
        self._validate_heads()
        self._validate_routing(
            "attention_routing", "num_attention_experts_per_tok", self.num_attention_experts, "num_attention_experts"
        )

    def _validate_choices(self, choices: dict[str, tuple[Any, ...]]) -> None:
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {valid}, found {getattr(self, name)!r}")

    def _validate_heads(self) -> None:
        for name, heads, experts in (
            ("num_attention_heads", self.num_attention_heads, self.num_attention_experts),
            ("num_key_value_heads", self.num_key_value_heads, self.num_key_value_experts),
        ):
            if heads % experts:
                raise ValueError(f"{name} ({heads}) counts all experts, so it must divide by {experts}")
        if self.num_dense_heads % self.num_dense_key_value_heads:
            raise ValueError(
                f"each attention expert has {self.num_dense_heads} query heads, which do not divide into "
                f"{self.num_dense_key_value_heads} key/value heads"
            )

    def _validate_routing(self, routing: str, selected: str, count: int, counted: str) -> None:
        """Check k (`selected`) against the `count` experts that `counted` names; None when all run."""
        k = getattr(self, selected)
        if getattr(self, routing) == "soft":
            if k is not None and k != count:
                raise ValueError(f"{routing} is soft: all {count} experts run, so leave {selected} out (found {k})")
            setattr(self, selected, None)
        elif isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= count:
            raise ValueError(f"{selected} must be between 1 and {counted} ({count}), found {k!r}")


def task_blind_message(routers: tuple[str, ...] | list[str]) -> str:
    """Why top-1 renormalised routers learn nothing, and what to choose instead."""
    scale = "soft routing" if "self_attn.gate" in routers else "routed_scaling_factor = number of experts"
    return (
        f"{' and '.join(routers)}: with one expert per token and renormalised gates every gate is 1, so the task gives "
        f"the router no gradient. Use true probabilities (no renormalisation), which with {scale} keeps the function "
        "of identical experts, or select two experts."
    )


__all__ = ["AttentionExpertsConfig", "task_blind_message"]
