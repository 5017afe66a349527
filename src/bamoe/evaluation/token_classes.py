"""Where routers send words, numbers and punctuation: the routing of a text by the class of the routed token.

Shapes: L layers, N tokens, E experts, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bamoe.evaluation.routing import ROUTERS, assignments, router_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

TOKEN_CLASSES = (
    "word start",
    "word continuation",
    "number",
    "punctuation",
    "white space",
    "part of a character",
    "special",
)
_SPACE_MARKS = ("\u0120", "\u2581")  # how byte-level BPE and SentencePiece write a space in front of a word
_CONTINUATION_MARK = "##"  # of WordPiece
_REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to


@dataclass(frozen=True)
class TokenClassRouting:
    """One kind of router over the tokens of one class, of all domains.

    tokens: how many were routed.
    load: (L, E) share of their assignments that went to each expert; soft routing: share of the weight.
    experts_per_token: (L,) mean number of experts that such a token is computed by; see `LayerRouting`.
    """

    tokens: int
    load: list[list[float]]
    experts_per_token: list[float]


def token_class(text: str, entry: str) -> str:
    """The class of a token that is not special, from its text and its entry in the vocabulary.

    Letters make a word, which starts where the entry begins with a space; without letters, digits make a number; what
    has neither is punctuation (symbols, control characters and emoji too). A word right after a line break or a bracket
    has no space in front, so it counts as a continuation: an entry knows nothing of its neighbours.
    """
    if _REPLACEMENT in text:
        return "part of a character"
    if not text.strip():
        return "white space"
    if any(letter.isalpha() for letter in text):
        return "word start" if text[0].isspace() or entry.startswith(_SPACE_MARKS) else "word continuation"
    return "number" if any(letter.isnumeric() for letter in text) else "punctuation"


def token_classes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """(vocab_size,) index into `TOKEN_CLASSES` of every token id; ids that the tokenizer does not know are special.

    In a vocabulary that marks no space (WordPiece, whole words), a word starts where it is not marked as continued.
    """
    known = min(vocab_size, len(tokenizer))
    entries = [str(entry) for entry in tokenizer.convert_ids_to_tokens(list(range(known)))]
    texts = tokenizer.batch_decode([[token] for token in range(known)], clean_up_tokenization_spaces=False)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    spaced = any(entry.startswith(_SPACE_MARKS) for entry in entries)
    names = []
    for token, (text, entry) in enumerate(zip(texts, entries, strict=True)):
        name = "special" if token in special else token_class(text, entry)
        if not spaced and name == "word continuation" and not entry.startswith(_CONTINUATION_MARK):
            name = "word start"
        names.append(name)
    return [TOKEN_CLASSES.index(name) for name in names] + [TOKEN_CLASSES.index("special")] * (vocab_size - known)


class TokenClassCounts:
    """Assignments of the tokens of each class to each expert, (L, C, E) per kind of router.

    Args:
        config: of a mixture.
        tokenizer: whose vocabulary is put into classes.
    """

    def __init__(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._class_of = torch.tensor(token_classes(tokenizer, config.vocab_size))
        self._statistics = router_statistics(config)
        self._counts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def update(self, ids: torch.Tensor, outputs: Any) -> None:
        """Add a forward pass over `ids` with `output_router_logits=True`."""
        for kind, (name, _, _) in ROUTERS.items():
            if not (logits := getattr(outputs, name, None)):
                continue
            assigned = assignments(logits, self._statistics[kind].top_k).double()
            classes = self._class_of.to(ids.device)[ids.flatten()].to(assigned.device)
            if kind not in self._counts:
                self._counts[kind] = assigned.new_zeros(len(assigned), len(TOKEN_CLASSES), assigned.shape[-1])
            self._counts[kind].index_add_(1, classes, assigned)

    def routing(self) -> dict[str, dict[str, TokenClassRouting]]:
        """`[kind][class]` of all tokens so far; classes that did not occur are left out."""
        found: dict[str, dict[str, TokenClassRouting]] = {}
        for kind, counts in self._counts.items():
            tokens = counts[0].sum(dim=-1)  # each token's assignments sum to 1
            for index, name in enumerate(TOKEN_CLASSES):
                if tokens[index] == 0:
                    continue
                load = counts[:, index] / tokens[index]
                found.setdefault(kind, {})[name] = TokenClassRouting(
                    tokens=round(tokens[index].item()),
                    load=load.tolist(),
                    experts_per_token=self._statistics[kind].experts_per_token(load).tolist(),
                )
        return found
