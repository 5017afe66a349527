"""What the demo's steps call, each in a worker process: plain data in and out, heavy imports inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_corpora(directory: str, seed: int, max_characters: int) -> dict[str, Any]:
    """Write the built-in corpora; returns sizes and hashes."""
    from bamoe.data.builtin import describe, write_builtin_corpora

    return describe(write_builtin_corpora(directory, seed, max_characters))


def take_corpora(source: str, directory: str) -> dict[str, Any]:
    """Copy the corpora of a folder; returns sizes and hashes."""
    from bamoe.data.builtin import copy_corpora, describe

    return describe(copy_corpora(source, directory))


def make_untrained(data: str, shares: dict[str, float], out: str, **shape: int) -> dict[str, Any]:
    """A byte-level BPE tokenizer learnt from the seed's mix, and a Llama with random weights."""
    from bamoe.experiments.untrained import write_untrained

    return write_untrained(Path(data), shares, Path(out), **shape)


def upcycle_from(recipe: str, out: str) -> dict[str, Any]:
    """`bamoe upcycle RECIPE OUT`."""
    from bamoe.recipes.upcycle import upcycle

    upcycle(recipe, out, force=True)
    return {}


def train_from(config: str, output: str) -> dict[str, Any]:
    """`bamoe train CONFIG`, going on with an interrupted run; returns what was read and the curve of its log."""
    from bamoe.training import train

    result = train(config, force=(Path(output) / "config.json").exists())
    log = [json.loads(line) for line in result.log.read_text(encoding="utf-8").splitlines()]
    validations = [entry for entry in log if "eval_average_perplexity" in entry]
    return {
        "tokens": result.tokens,
        "validation": [(entry["tokens"], entry["eval_average_perplexity"]) for entry in validations],
        "loss": [(entry["tokens"], entry.get("cross_entropy", entry["loss"])) for entry in log if "loss" in entry],
    }


def measure(model: str, data: dict[str, str], sequence_length: int) -> dict[str, Any]:
    """`bamoe evaluate` and `bamoe inspect`."""
    from bamoe.evaluation import evaluate
    from bamoe.recipes.inspection import inspect

    evaluation = evaluate(model, dict(data), sequence_length=sequence_length)
    costs = inspect(model, context=sequence_length)
    return {
        "evaluation": evaluation.to_dict(),
        "parameters": costs["parameters"],
        "flops_per_token": costs["flops_per_token"],
    }


def generate_sample(model: str, prompts: dict[str, str], seed: int, tokens: int = 60) -> dict[str, str]:
    """One continuation per prompt, sampled."""
    import torch

    from bamoe.checkpoints.loading import load_model, load_tokenizer

    network: Any = load_model(model)
    tokenizer: Any = load_tokenizer(model)
    torch.manual_seed(seed)
    texts = {}
    for domain, prompt in prompts.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        output = network.generate(
            **inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, pad_token_id=tokenizer.eos_token_id
        )
        texts[domain] = tokenizer.decode(output[0], skip_special_tokens=True)
    return texts
