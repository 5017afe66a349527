"""What experts specialise in: how much a router's choice says about the token and the domain, and which tokens.

Shapes: L layers, N tokens, F tokens of the vocabulary that are frequent enough, E experts. Information is in nats.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bamoe.data.tokens import TokenStream
from bamoe.evaluation.routing import ROUTERS, LayerRouting, assignments

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

MIN_COUNT = 10  # of a token; with fewer, its share is mostly chance
TOP_TOKENS = 10
_READ_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class TokenAffinity:
    """A token that goes to an expert more often than tokens do on average.

    count: occurrences in the text. share: p(expert | token).
    pmi: log p(token, expert) - log p(token) - log p(expert), as in the tables of MoA (arXiv 2210.05144).
    """

    token: int
    text: str
    count: int
    share: float
    pmi: float


@dataclass(frozen=True)
class LayerSpecialization:
    """One layer's router over the text of all domains.

    domain_information: mutual information of domain and expert, every domain weighing the same: 0 when all domains
        are routed alike, at most the logarithm of the number of domains or experts.
    token_information: mutual information of token and expert, among the frequent tokens; at most ln(E).
    chance_information: about what the latter would be, in a text of this length, were the choice independent of the
        token: an estimate from counts is never 0.
    tokens: for every expert those with the highest pmi, most frequent first among equals; none with a pmi below 0.
    """

    domain_information: float
    token_information: float
    chance_information: float
    tokens: list[list[TokenAffinity]]


class TokenAssignments:
    """How often each frequent token is assigned to each expert of one kind of router; holds (L, F + 1, E) numbers.

    Soft routing assigns a token to every expert in part, with its probability.

    Args:
        occurrences: (vocabulary,) how often each token will be seen in all.
        top_k: experts per token; None for soft routing.
    """

    def __init__(self, occurrences: np.ndarray, top_k: int | None) -> None:
        self.top_k = top_k
        self.token_ids = np.flatnonzero(occurrences >= MIN_COUNT)
        self.occurrences = occurrences[self.token_ids]
        self._row = np.full(len(occurrences), len(self.token_ids))  # rare tokens share the last row
        self._row[self.token_ids] = np.arange(len(self.token_ids))
        self.counts: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None  # (L, E): squared assignments of frequent tokens

    @torch.no_grad()
    def update(self, ids: torch.Tensor, logits: Sequence[torch.Tensor]) -> None:
        """Add the tokens `ids` (N,) of one forward pass, whose routers gave one (N, E) per layer."""
        assigned = assignments(logits, self.top_k).double()
        rows = torch.from_numpy(self._row[ids.cpu().numpy()]).to(assigned.device)
        if self.counts is None or self._squares is None:
            layers, _, experts = assigned.shape
            self.counts = assigned.new_zeros(layers, len(self.token_ids) + 1, experts)
            self._squares = assigned.new_zeros(layers, experts)
        self.counts.index_add_(1, rows, assigned)
        self._squares += assigned[:, rows < len(self.token_ids)].square().sum(dim=1)

    def layers(
        self, domains: Sequence[Sequence[LayerRouting]], tokenizer: PreTrainedTokenizerBase
    ) -> list[LayerSpecialization]:
        """One entry per layer; `domains` is the routing of the same text, `[domain][layer]`."""
        if self.counts is None or self._squares is None:
            return []
        return [
            self._layer(counts, squares, [layers[number].load for layers in domains], tokenizer)
            for number, (counts, squares) in enumerate(
                zip(self.counts.cpu().numpy(), self._squares.cpu().numpy(), strict=True)
            )
        ]

    def _layer(
        self,
        counts: np.ndarray,
        squares: np.ndarray,
        loads: Sequence[Sequence[float]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> LayerSpecialization:
        frequent = counts[:-1]
        expert_share = counts.sum(axis=0) / counts.sum()
        given_token = frequent / self.occurrences[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            pmi = np.log(given_token) - np.log(expert_share)
        return LayerSpecialization(
            domain_information=mutual_information(np.array(loads)),
            token_information=mutual_information(frequent),
            chance_information=_chance_information(frequent, squares),
            tokens=[self._top(pmi[:, expert], given_token[:, expert], tokenizer) for expert in range(counts.shape[1])],
        )

    def _top(self, pmi: np.ndarray, share: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[TokenAffinity]:
        order = np.lexsort((self.token_ids, -self.occurrences, -pmi.round(12)))
        return [
            TokenAffinity(
                token=int(self.token_ids[row]),
                text=_text(int(self.token_ids[row]), tokenizer),
                count=int(self.occurrences[row]),
                share=float(share[row]),
                pmi=float(pmi[row]),
            )
            for row in order[:TOP_TOKENS]
            if pmi[row] > 0  # an unused expert has NaN here
        ]


class TokenExperts:
    """`TokenAssignments` of each kind of router of a decoder mixture.

    Args:
        config: of a mixture.
        streams: the texts that will be seen, once each.
        max_tokens: of each text.
    """

    def __init__(self, config: PreTrainedConfig, streams: Iterable[TokenStream], max_tokens: int | None = None) -> None:
        occurrences = np.zeros(config.vocab_size, dtype=np.int64)
        for stream in streams:
            # The last token of a text is a target only: no router sees it.
            seen = len(stream) - 1 if max_tokens is None else min(len(stream) - 1, max_tokens)
            for start in range(0, seen, _READ_AT_ONCE):
                ids = stream.tokens(start, min(start + _READ_AT_ONCE, seen))
                occurrences += np.bincount(ids, minlength=len(occurrences))
        self.kinds = {
            kind: TokenAssignments(occurrences, getattr(config, top_k, None)) for kind, (_, top_k, _) in ROUTERS.items()
        }

    def update(self, ids: torch.Tensor, outputs: Any) -> None:
        """Add a forward pass over `ids` with `output_router_logits=True`."""
        for kind, (name, _, _) in ROUTERS.items():
            if logits := getattr(outputs, name, None):
                self.kinds[kind].update(ids.flatten(), logits)

    def layers(
        self, routing: dict[str, dict[str, list[LayerRouting]]], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, list[LayerSpecialization]]:
        """`[kind][layer]`; `routing` is that of the same texts, `[kind][domain][layer]`."""
        return {kind: self.kinds[kind].layers(list(domains.values()), tokenizer) for kind, domains in routing.items()}


def mutual_information(joint: np.ndarray) -> float:
    """Of the row and the column of a table of weights (A, B), in nats; 0 for a table without weight."""
    total = joint.sum()
    if not total:
        return 0.0
    probability = joint / total
    independent = probability.sum(axis=1, keepdims=True) * probability.sum(axis=0, keepdims=True)
    used = probability > 0
    return max(0.0, float((probability[used] * np.log(probability[used] / independent[used])).sum()))


def _chance_information(counts: np.ndarray, squares: np.ndarray) -> float:
    """Expected mutual information of tokens and experts that are independent: half a chi-squared statistic's mean.

    Every token of the vocabulary but one adds, over 2N, the variance of the assignment to each expert over its mean.
    """
    tokens = counts.sum()  # every occurrence is assigned with a total weight of 1
    if not tokens:
        return 0.0
    mean, square = counts.sum(axis=0) / tokens, squares / tokens
    used = mean > 0
    return float((len(counts) - 1) / (2 * tokens) * (square[used] / mean[used] - mean[used]).sum())


def _text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode([token])
    # Part of a character decodes to a replacement mark; its name in the vocabulary says more.
    return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text
