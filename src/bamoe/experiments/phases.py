"""What an experiment's steps call, each in a worker process: plain data in and out, heavy imports inside.

Every call writes into its step's folder what a person needs to do the same by hand: the recipe of `bamoe upcycle`, the
config of `bamoe train`.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bamoe.errors import BamoeError

if TYPE_CHECKING:
    from bamoe.training import TrainConfig

RECIPE_FILE, TRAINING_FILE, BLOCKS_FILE = "upcycle.yaml", "train.yaml", "blocks.json"
_WARMUP_STEPS = 3  # of a timed model: allocations and lazy initialisation


def write_builtin_text(directory: str, seed: int, max_characters: int) -> dict[str, Any]:
    """Write the built-in corpora; returns their sizes and hashes."""
    from bamoe.data.builtin import describe, write_builtin_corpora

    return describe(write_builtin_corpora(directory, seed, max_characters))


def describe_text(files: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the user's corpora, which stay where they are."""
    return dict(files)


def make_untrained(
    folder: str,
    corpora: Mapping[str, Mapping[str, str]],
    shares: Mapping[str, float],
    architecture: Mapping[str, Any],
    sequence_length: int,
    seed: int,
) -> dict[str, Any]:
    """A byte-level BPE tokenizer learnt from the seed's mix, and a Llama with random weights."""
    from bamoe.experiments.untrained import write_untrained

    return write_untrained(
        corpora, shares, Path(folder) / "model", architecture, sequence_length=sequence_length, seed=seed
    )


def mix(folder: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """`bamoe upcycle`."""
    from bamoe.recipes.upcycle import upcycle

    upcycle(str(_write_yaml(Path(folder) / RECIPE_FILE, recipe)), Path(folder) / "model", force=True)
    return {}


def train_row(
    folder: str, config: dict[str, Any], launch: str | None = None, timed: str | None = None
) -> dict[str, Any]:
    """`bamoe train`, going on with an interrupted run; returns what was read and the curves of its log.

    launch: a command put before it, such as "torchrun --nproc-per-node 8". timed: the record of `time_step`, which
    says how many tokens the device time of another row allows.
    """
    from bamoe.training import TrainConfig

    if timed is not None:
        config = _sized(config, json.loads(Path(timed).read_text(encoding="utf-8"))["result"]["tokens"])
    file = _write_yaml(Path(folder) / TRAINING_FILE, config)
    parsed = TrainConfig.read(file)
    output = Path(parsed.output)
    start, seconds = time.perf_counter(), None
    if not _is_finished(output, parsed):
        force = (output / "config.json").exists()
        if launch is None:
            from bamoe.training import train

            seconds = train(parsed, force=force).seconds
        else:
            command = [*shlex.split(launch), "-m", "bamoe", "train", str(file), *(["--force"] if force else [])]
            if code := subprocess.run(command, check=False).returncode:
                raise BamoeError(f"{shlex.join(command)} ended with exit code {code}")
    log = [json.loads(line) for line in (output / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    validations = [entry for entry in log if "eval_average_perplexity" in entry]
    return {
        "tokens": parsed.steps * parsed.batch_tokens,
        "seconds": time.perf_counter() - start if seconds is None else seconds,
        "validation": [(entry["tokens"], entry["eval_average_perplexity"]) for entry in validations],
        "loss": [(entry["tokens"], entry.get("cross_entropy", entry["loss"])) for entry in log if "loss" in entry],
    }


def time_step(
    model: str,
    other: str,
    other_tokens: int,
    batch_tokens: int,
    micro_batch_tokens: int,
    sequence_length: int,
    steps: int,
) -> dict[str, Any]:
    """How long a training step of two models takes, turn by turn in one process, and the tokens of equal time.

    Seconds are medians over `steps` steps of random tokens. The ratio is what counts: the machine may be shared.
    """
    import statistics

    import torch

    from bamoe.checkpoints.loading import load_model

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    networks: list[Any] = [load_model(path).to(device).train() for path in (model, other)]
    optimizers = [torch.optim.AdamW(network.parameters(), lr=0.0) for network in networks]
    generator = torch.Generator().manual_seed(0)
    shape = (micro_batch_tokens // sequence_length, sequence_length)
    seconds: list[list[float]] = [[], []]
    for step in range(_WARMUP_STEPS + steps):
        ids = torch.randint(networks[0].config.vocab_size, shape, generator=generator).to(device)
        for network, optimizer, taken in zip(networks, optimizers, seconds, strict=True):
            start = _now(device)
            for _ in range(batch_tokens // micro_batch_tokens):
                network(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= _WARMUP_STEPS:
                taken.append(_now(device) - start)
    own, others = (statistics.median(taken) for taken in seconds)
    return {"seconds_per_step": own, "other_seconds_per_step": others, "tokens": int(other_tokens * others / own)}


def evaluate_row(
    folder: str, model: str, corpora: list[dict[str, Any]], sequence_length: int, document_mask: bool
) -> dict[str, Any]:
    """`bamoe evaluate`, with the score of every block kept beside it so that rows can be paired over the same text."""
    from bamoe.data.corpora import Corpus
    from bamoe.evaluation import evaluate

    evaluation = evaluate(
        model,
        {corpus["name"]: Corpus(**corpus) for corpus in corpora},
        sequence_length=sequence_length,
        document_mask=document_mask,
        specialization=True,
    )
    blocks = {"nats": evaluation.block_nats, "tokens": evaluation.block_tokens}
    (Path(folder) / BLOCKS_FILE).write_text(json.dumps(blocks), encoding="utf-8")
    return evaluation.to_dict()


def generate_samples(model: str, prompts: Mapping[str, str], seed: int, tokens: int) -> dict[str, str]:
    """One continuation per prompt, sampled."""
    import torch

    from bamoe.checkpoints.loading import load_model, load_tokenizer

    network: Any = load_model(model)
    tokenizer: Any = load_tokenizer(model)
    torch.manual_seed(seed)
    texts = {}
    for name, prompt in prompts.items():
        inputs = tokenizer(prompt, return_tensors="pt")
        output = network.generate(
            **inputs, max_new_tokens=tokens, do_sample=True, temperature=0.7, pad_token_id=tokenizer.eos_token_id
        )
        texts[name] = tokenizer.decode(output[0], skip_special_tokens=True)
    return texts


def training_schedule(schedule: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """A schedule in shares of a run, for a run of `tokens`."""
    shape = {key: value for key, value in schedule.items() if key != "warmup" and value is not None}
    return {"warmup_tokens": int(schedule["warmup"] * tokens), **shape}


def _sized(config: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A training config for another number of tokens: its warm-up and validations keep their share of the run."""
    tokens = max(tokens, config["batch_tokens"])
    scale = tokens / config["tokens"]
    schedule = config["schedule"] | {"warmup_tokens": int(config["schedule"]["warmup_tokens"] * scale)}
    often: dict[str, Any] = {
        key: max(config["batch_tokens"], int(config[key] * scale))
        for key in ("evaluate_every_tokens", "save_every_tokens")
        if key in config
    }
    return {**config, **often, "tokens": tokens, "schedule": schedule}


def _is_finished(output: Path, config: TrainConfig) -> bool:
    """Whether a run of just this config is complete there: it was, if this step was killed before its record."""
    try:
        recorded = json.loads((output / "training_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(recorded == config.model_dump(mode="json"))


def _now(device: Any) -> float:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _write_yaml(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
    return path
