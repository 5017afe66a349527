"""What the BAM paper's 590M and 2B experiments would take, from configs alone: FLOPs, GPU-hours, nodes, days, memory.

Sizes, batch and warm-up are the paper's (arXiv 2408.08274). Tokens of each phase, context, GPU and utilisation are
assumptions: give your own.

Run: python benchmarks/paper_scale.py
"""

import argparse
from dataclasses import dataclass
from typing import Any

from bamoe.modeling.configuration_bamoe import BamoeConfig
from bamoe.modeling.costs import count_parameters, flops_per_token
from bamoe.modeling.parallel import check_tensor_parallel

PAPER_BATCH = 1_000_000  # tokens of one optimizer step
PAPER_WARMUP_STEPS = 1500
DENSE: dict[str, dict[str, Any]] = {
    "590M": {
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "2B": {
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 18,
        "num_attention_heads": 18,
        "num_key_value_heads": 6,
        "tie_word_embeddings": True,
    },
}
MIXTURES: dict[str, dict[str, Any]] = {
    "BTX, 4 experts top-1": {},
    "BTX, 6 experts top-3": {"num_experts": 6, "num_experts_per_tok": 3},
    "BAM, KV sharing": {"num_attention_experts": 4, "attention_key_value": "shared"},
    "BAM, KV experts": {"num_attention_experts": 4, "attention_key_value": "experts"},
}
BRANCHES = 3  # code, law, math; the fourth expert is the seed
# float32 weights, gradients and AdamW's two averages, all sharded.
BYTES_PER_PARAMETER = 16
# A vocabulary of logits per token: in bfloat16, in float32 for the loss, and its gradient.
BYTES_PER_LOGIT = 2 + 4 + 4


@dataclass(frozen=True)
class Job:
    """One training: a model, its tokens and the nodes it gets."""

    name: str
    config: BamoeConfig
    tokens: float
    nodes: int


def config_of(size: str, num_attention_experts: int = 1, num_experts: int = 4, **changes: Any) -> BamoeConfig:
    """A model of the paper's shape; one expert of each kind is the dense model (and a router row per layer)."""
    dense = DENSE[size]
    shared = changes.get("attention_key_value") == "shared"
    return BamoeConfig(
        vocab_size=256_000,
        head_dim=128,
        use_parallel_block=True,
        num_experts=num_experts,
        num_attention_experts=num_attention_experts,
        **dense
        | changes
        | {
            "num_attention_heads": dense["num_attention_heads"] * num_attention_experts,
            "num_key_value_heads": dense["num_key_value_heads"] * (1 if shared else num_attention_experts),
        },
    )


def gathered_bytes(config: BamoeConfig) -> float:
    """The largest unit that FSDP2 holds whole, in float32, twice: in use, and the next one on its way."""
    vocabulary = config.vocab_size * config.hidden_size
    embeddings = vocabulary * (1 if config.tie_word_embeddings else 2)
    layer = (count_parameters(config).total - embeddings) / config.num_hidden_layers
    return 2 * 4 * max(layer, vocabulary)


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(columns) + " |")
    print("|---|" + "--:|" * (len(columns) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def tensor_parallel_sizes(config: BamoeConfig, most: int) -> str:
    sizes = []
    for ranks in range(1, most + 1):
        try:
            check_tensor_parallel(config, ranks)
        except ValueError:
            continue
        sizes.append(str(ranks))
    return ", ".join(sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--branch-tokens", type=float, default=100e9, help="assumed: of each branch")
    parser.add_argument("--mixture-tokens", type=float, default=100e9, help="assumed: of each mixture")
    parser.add_argument("--context", type=int, default=2048, help="assumed: tokens of a training sequence")
    parser.add_argument("--micro-batch", type=int, default=8192, help="tokens of one forward pass on one GPU")
    parser.add_argument("--peak", type=float, default=989e12, help="bfloat16 FLOP/s of one GPU, dense (H100 SXM)")
    parser.add_argument("--utilisation", type=float, default=0.35, help="of that peak, reached by model FLOPs")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--branch-nodes", type=int, default=1)
    parser.add_argument("--mixture-nodes", type=int, default=4)
    given = parser.parse_args()

    for size in DENSE:
        dense = config_of(size, num_experts=1)
        jobs = [Job("one branch", dense, given.branch_tokens, given.branch_nodes)]
        jobs += [
            Job(name, config_of(size, **changes), given.mixture_tokens, given.mixture_nodes)
            for name, changes in MIXTURES.items()
        ]
        rows = []
        total_hours = mixture_days = branch_days = 0.0
        for job in jobs:
            counts = count_parameters(job.config)
            flops = 3 * flops_per_token(job.config, given.context).total
            gpus = job.nodes * given.gpus_per_node
            gpu_hours = flops * job.tokens / (given.peak * given.utilisation) / 3600
            memory = counts.total * BYTES_PER_PARAMETER / gpus + gathered_bytes(job.config)
            memory += given.micro_batch * job.config.vocab_size * BYTES_PER_LOGIT
            if job is jobs[0]:
                total_hours += BRANCHES * gpu_hours
                branch_days = gpu_hours / gpus / 24
            else:
                total_hours += gpu_hours
                mixture_days += gpu_hours / gpus / 24
            rows.append(
                [
                    job.name,
                    f"{counts.total / 1e9:.2f}B",
                    f"{counts.active / 1e9:.2f}B",
                    f"{flops / 1e9:.2f}",
                    f"{flops * job.tokens / 1e18:,.0f}",
                    f"{gpu_hours:,.0f}",
                    str(job.nodes),
                    f"{gpu_hours / gpus / 24:.1f}",
                    f"{memory / 1e9:.1f}",
                    tensor_parallel_sizes(job.config, given.gpus_per_node),
                ]
            )
        print(f"**{size}**\n")
        print_table(
            [
                *("job", "total", "active", "training FLOPs per token (G)", "training EFLOPs", "GPU-hours", "nodes"),
                *("days", "GB per GPU", "tensor parallel over"),
            ],
            rows,
        )
        print(
            f"{BRANCHES} branches and {len(MIXTURES)} mixtures: {total_hours:,.0f} GPU-hours. The branches side by "
            f"side on {BRANCHES * given.branch_nodes} nodes, then the mixtures in turn on {given.mixture_nodes}: "
            f"{branch_days + mixture_days:.1f} days. Steps: {given.branch_tokens / PAPER_BATCH:,.0f} a branch, "
            f"{given.mixture_tokens / PAPER_BATCH:,.0f} a mixture, of which {PAPER_WARMUP_STEPS:,} warm-up.\n"
        )


if __name__ == "__main__":
    main()
