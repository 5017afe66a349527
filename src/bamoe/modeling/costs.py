"""What a mixture costs, from its config alone: parameters, FLOPs per token, bytes of KV cache per token.

Convention, everywhere in bamoe: 2 FLOPs per multiply-accumulate, the causal attention core at half, routers counted;
norms, activations, softmax and the embedding lookup not.
"""

from dataclasses import dataclass

from .configuration_bamoe import BamoeConfig


@dataclass(frozen=True)
class ParameterCounts:
    """total: all parameters, tied ones once. active: those one token uses: the selected feed-forward experts, and with
    top-k attention the selected experts' query and output projections (every expert's keys and values are needed by
    later tokens)."""

    total: int
    active: int


@dataclass(frozen=True)
class FlopsPerToken:
    """FLOPs of one token's forward pass, all layers; a training step is three times as much."""

    attention: float
    feed_forward: float
    head: float

    @property
    def total(self) -> float:
        """Attention, feed-forward and head together."""
        return self.attention + self.feed_forward + self.head


def count_parameters(config: BamoeConfig) -> ParameterCounts:
    """Parameters of `BamoeForCausalLM(config)`."""
    layers, width = config.num_hidden_layers, config.hidden_size
    query_output = _query_output_parameters(config)
    attention = config.num_attention_experts * query_output + _key_value_parameters(config) + _attention_gate(config)
    expert = _feed_forward_expert(config)
    feed_forward = config.num_experts * expert + _feed_forward_gate(config)
    norms = (1 if config.use_parallel_block else 2) * width
    embeddings = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    total = layers * (attention + feed_forward + norms) + width + embeddings
    idle_feed_forward = config.num_experts - (config.num_experts_per_tok or config.num_experts)
    idle_attention = config.num_attention_experts - (
        config.num_attention_experts_per_tok or config.num_attention_experts
    )
    return ParameterCounts(total, total - layers * (idle_feed_forward * expert + idle_attention * query_output))


def flops_per_token(config: BamoeConfig, context_length: int) -> FlopsPerToken:
    """Forward FLOPs per token of sequences of `context_length` tokens.

    Top-k attention routing masks the gates, so all attention experts are computed and counted. A sliding window
    shortens the context of its layers.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    query_width = config.num_attention_heads * config.head_dim
    key_value_width = config.num_key_value_heads * config.head_dim
    gate = _attention_gate(config)
    projections = 2 * (2 * width * query_width + 2 * width * key_value_width + gate)
    # Query-key products and the weighted sum of values: 2 FLOPs each per past token and channel, half of them masked.
    core = sum(2 * 2 * query_width * _mean_attended(config, kind, context_length) for kind in config.layer_types)
    selected = config.num_experts_per_tok or config.num_experts
    feed_forward = 2 * (selected * _feed_forward_expert(config) + _feed_forward_gate(config))
    return FlopsPerToken(
        attention=layers * projections + core,
        feed_forward=layers * feed_forward,
        head=2 * width * config.vocab_size,
    )


def kv_cache_bytes_per_token(config: BamoeConfig, bytes_per_value: int) -> int:
    """Bytes that one more token adds to the KV cache, all layers (until a sliding window is full)."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_value


def _mean_attended(config: BamoeConfig, layer_type: str, context_length: int) -> float:
    """Past tokens that a token attends to, averaged over the context: half of it, or what a window W leaves."""
    if layer_type == "full_attention" or config.sliding_window is None or config.sliding_window >= context_length:
        return context_length / 2
    window = config.sliding_window
    return window - window * window / (2 * context_length)


def _feed_forward_expert(config: BamoeConfig) -> int:
    return 3 * config.hidden_size * config.intermediate_size


def _feed_forward_gate(config: BamoeConfig) -> int:
    experts = config.num_routed_experts
    return experts * config.hidden_size if experts > 1 else 0


def _attention_gate(config: BamoeConfig) -> int:
    experts = config.num_attention_experts
    return experts * config.hidden_size if experts > 1 else 0


def _query_output_parameters(config: BamoeConfig) -> int:
    """Of one attention expert: W_q and W_o with their biases, and its share of the query norms."""
    query_width = config.num_dense_heads * config.head_dim
    count = 2 * config.hidden_size * query_width
    count += query_width if config.attention_bias else 0
    count += config.hidden_size if config.attention_output_bias else 0
    return count + {None: 0, "expert": config.head_dim, "head": query_width}[config.qk_norm]


def _key_value_parameters(config: BamoeConfig) -> int:
    """W_k and W_v of all experts with their biases, and the key norms."""
    width = config.num_key_value_heads * config.head_dim
    count = 2 * (config.hidden_size + (1 if config.attention_bias else 0)) * width
    return count + {None: 0, "expert": config.num_key_value_experts * config.head_dim, "head": width}[config.qk_norm]
