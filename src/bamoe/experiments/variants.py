"""The variants that an experiment can name: dense models and mixtures, and the text that each trains on."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

_BTX = re.compile(r"btx-(?:top-(?P<k>[1-9]\d?)(?:-of-(?P<seats>[1-9]\d?))?|soft)")
_BAM = re.compile(r"bam-kv-(?P<keys>experts|sharing)(?:-top-(?P<k>[1-9]\d?))?")


@dataclass(frozen=True)
class Variant:
    """One way to use the text: `name` in reports, `recipe` of its upcycling (None: dense), `tokens` of its training.

    tokens: "mixture": those of phase 3 only. "all": branch and mixture text together, from the seed.
    seats: expert seats, where more than there are dense models; the seed's copies fill the rest.
    """

    name: str
    recipe: dict[str, Any] | None
    tokens: Literal["mixture", "all"] = "mixture"
    seats: int | None = None


VARIANT_NAMES = (
    *("dense-mixture", "dense-all", "sparse-mixture", "sparse-all"),
    *("btx-top-K", "btx-soft", "btx-top-K-of-SEATS"),
    *("bam-kv-sharing", "bam-kv-experts", "bam-kv-sharing-top-K", "bam-kv-experts-top-K"),
)

# One feed-forward expert per token with its true probability: BAM's routing (section 3), for its BTX baseline too.
_TOP_1: dict[str, Any] = {"num_experts_per_tok": 1, "norm_topk_prob": False}


def variant(name: str) -> Variant:
    """The variant called `name`.

    BTX with one expert per token has the BAM paper's routing, so that it differs from BAM in attention only. With more,
    and in sparse upcycling, gates of the selected experts sum to 1, as in BTX's and sparse upcycling's own papers.

    Raises:
        ValueError: no such variant.
    """
    if name in ("dense-mixture", "dense-all"):
        tokens: Literal["mixture", "all"] = "all" if name == "dense-all" else "mixture"
        return Variant(f"dense, {tokens} tokens", None, tokens)
    if name in ("sparse-mixture", "sparse-all"):
        tokens = "all" if name == "sparse-all" else "mixture"
        return Variant(f"sparse upcycling, {tokens} tokens", {"recipe": "sparse"}, tokens)
    if found := _BTX.fullmatch(name):
        return _btx(found["k"], found["seats"])
    if found := _BAM.fullmatch(name):
        return _bam(found["keys"], found["k"])
    close = difflib.get_close_matches(name, VARIANT_NAMES, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"no variant {name!r}; {hint}known: {', '.join(VARIANT_NAMES)}")


def _btx(k: str | None, seats: str | None) -> Variant:
    if k is None:
        return Variant("BTX, soft", {"recipe": "btx", "feed_forward": {"routing": "soft"}})
    if seats is not None and int(k) > int(seats):
        raise ValueError(f"btx-top-{k}-of-{seats} selects {k} of {seats} experts")
    routing = _TOP_1 if k == "1" else {"num_experts_per_tok": int(k), "norm_topk_prob": True}
    name = f"BTX top-{k}" + (f" of {seats}" if seats else "")
    return Variant(name, {"recipe": "btx", "feed_forward": dict(routing)}, seats=int(seats) if seats else None)


def _bam(keys: str, k: str | None) -> Variant:
    attention: dict[str, Any] = {"key_value": "shared" if keys == "sharing" else "experts", "routing": "soft"}
    if k is not None:
        attention |= {"routing": "top_k", "num_experts_per_tok": int(k), "gate_norm": "none"}
    name = f"BAM, KV {keys}" + (f", attention top-{k}" if k else "")
    return Variant(name, {"recipe": "bam", "attention": attention, "feed_forward": dict(_TOP_1)})
