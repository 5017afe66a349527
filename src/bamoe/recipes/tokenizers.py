"""Do two checkpoints read text as the same tokens? Compared from their files, without building a tokenizer.

The mixture keeps the seed's tokenizer, so every expert must have learnt the same ids. Special tokens that are put
around a text, and chat templates, change prompts rather than ids: see `preflight`, which only warns of them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from os.path import isfile  # unlike Path.is_file, false for a path too long or closed
from pathlib import Path
from typing import Any

from bamoe.errors import CheckpointError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_EXAMPLES = 3


@dataclass(frozen=True)
class TokenizerComparison:
    """What differs between two tokenizers; `compared` names the parts that both directories have."""

    differences: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)


def has_tokenizer(directory: Path) -> bool:
    """Whether a checkpoint directory carries a tokenizer."""
    return any(isfile(directory / name) for name in _FILES)


def compare_tokenizers(seed: Path, other: Path) -> TokenizerComparison:
    """Compare the tokenizer files of `other` with those of `seed`.

    Raises:
        CheckpointError: a tokenizer file cannot be read.
    """
    ours, theirs = _parts(seed), _parts(other)
    compared = [name for name in ours if name in theirs]
    if "token-to-id map" in compared:
        # The same vocabulary; the SentencePiece file it was converted from may differ in its comments.
        compared = [name for name in compared if name != "SentencePiece model"]
    differences = [
        f"{name}: {_describe_difference(ours[name], theirs[name])}" for name in compared if ours[name] != theirs[name]
    ]
    return TokenizerComparison(differences, compared)


def chat_template(directory: Path) -> Any:
    """The chat template of a checkpoint, or None."""
    path = directory / "chat_template.jinja"
    if isfile(path):
        return _read_text(path)
    return _read_json(directory / "tokenizer_config.json").get("chat_template")


def text_frame(directory: Path) -> Any:
    """The special tokens that tokenizer.json puts around every text, or None."""
    return _read_json(directory / "tokenizer.json").get("post_processor")


def _parts(directory: Path) -> dict[str, Any]:
    """The comparable parts of a tokenizer, by the name a reader of the report knows them under."""
    parts: dict[str, Any] = {}
    if isfile(directory / "tokenizer.json"):
        data = _read_json(directory / "tokenizer.json")
        try:
            parts |= _parts_of_tokenizer_json(data)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{directory / 'tokenizer.json'} has no form known here: {error!r}") from error
    elif isfile(directory / "vocab.json") and isfile(directory / "merges.txt"):
        parts["token-to-id map"] = _read_json(directory / "vocab.json") | _added_tokens(directory)
        lines = _read_text(directory / "merges.txt").splitlines()
        parts["merges"] = [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#version")]
    elif isfile(directory / "vocab.txt"):
        tokens = _read_text(directory / "vocab.txt").splitlines()
        parts["token-to-id map"] = {token: i for i, token in enumerate(tokens)} | _added_tokens(directory)
    if isfile(directory / "tokenizer.model"):
        content = _read_bytes(directory / "tokenizer.model")
        parts["SentencePiece model"] = f"SHA-256 {hashlib.sha256(content).hexdigest()[:12]}"
    return parts


def _parts_of_tokenizer_json(data: dict[str, Any]) -> dict[str, Any]:
    model = data.get("model") or {}
    vocabulary = model.get("vocab") or {}
    parts: dict[str, Any] = {"model type": model.get("type", "BPE")}
    if isinstance(vocabulary, list):  # Unigram: [token, score], the position is the id
        parts["token scores"] = dict(vocabulary)
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    added = data.get("added_tokens") or []
    parts["token-to-id map"] = vocabulary | {token["content"]: token["id"] for token in added}
    parts["merges"] = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model.get("merges") or []
    ]
    parts["normaliser"] = data.get("normalizer")
    parts["pre-tokenizer"] = data.get("pre_tokenizer")
    # How an added token matches text; `special` only matters when decoding.
    parts["added-token matching"] = {
        token["content"]: {name: token.get(name, False) for name in ("lstrip", "rstrip", "normalized", "single_word")}
        for token in added
    }
    return parts


def _added_tokens(directory: Path) -> dict[str, int]:
    return _read_json(directory / "added_tokens.json")


def _describe_difference(ours: Any, theirs: Any) -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict) and not {"type"} & ours.keys() & theirs.keys():
        keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
        examples = [
            f"{key!r} is {_value(ours, key)} in the seed, {_value(theirs, key)} here" for key in keys[:_EXAMPLES]
        ]
        return f"{len(keys)} differ: {'; '.join(examples)}{'; ...' if len(keys) > _EXAMPLES else ''}"
    if isinstance(ours, list) and isinstance(theirs, list):
        first = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if first is None:
            return f"{len(ours)} in the seed, {len(theirs)} here"
        return f"number {first} is {ours[first]} in the seed, {theirs[first]} here"
    return f"{_short(ours)} in the seed, {_short(theirs)} here"


def _value(mapping: dict[str, Any], key: str) -> str:
    return _short(mapping[key]) if key in mapping else "absent"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file."""
    if not isfile(path):
        return {}
    text = _read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; fetch or save the tokenizer again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object, found {type(data).__name__}")
    return data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
