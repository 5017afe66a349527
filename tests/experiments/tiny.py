"""An experiment at a microscopic size, on text that the tests write."""

import json
from pathlib import Path
from typing import Any

DOMAINS = ("general", "code", "law", "math")
WORDS = {
    "general": "the river ran under an old bridge near the town and the people walked along it",
    "code": "def value ( self , key ) : return self . items [ key ] if key in self . items else None",
    "law": "no person shall be held liable for any damage arising from the use of the said property",
    "math": "one apple and two apples make three apples so four times three apples make twelve apples",
}


def write_text(folder: Path) -> dict[str, dict[str, str]]:
    """Training and validation text of four domains; returns the experiment's `domains`."""
    domains: dict[str, dict[str, str]] = {}
    for number, (name, sentence) in enumerate(WORDS.items()):
        words = sentence.split()
        for part, count in (("train", 40), ("valid", 6)):
            path = folder / f"{name}.{part}.jsonl"
            texts = [
                " ".join(words[(i * (number + 2) + j * j + len(part)) % len(words)] for j in range(40))
                for i in range(count)
            ]
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            domains.setdefault(name, {})[part] = str(path)
    return domains


def experiment(folder: Path, **changes: Any) -> dict[str, Any]:
    """An experiment of seconds: seed 1536 tokens, branches 512 each, mixtures 1024."""
    return {
        "name": "tiny",
        "domains": write_text(folder),
        "sequence_length": 32,
        "batch_tokens": 256,
        "training": {"report_to": []},
        "seed": {
            "architecture": {
                "vocab_size": 280,
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
            },
            "tokens": 1536,
            "data": {"general": 0.7, "code": 0.1, "law": 0.1, "math": 0.1},
            "learning_rate": 4e-3,
        },
        "branches": {"tokens": 512},
        "mixture": {"tokens": 1024},
        "variants": ["dense-mixture", "dense-all", "btx-top-1", "bam-kv-experts"],
        **changes,
    }
