"""Training data: weighted corpora as one fixed sequence of equal blocks of tokens."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from bamoe.data.tokens import TokenStream
from bamoe.errors import DataError


class PackedMixture:
    """The blocks of a training run, in order; block i is a function of the arguments and i alone.

    So every process count sees the same blocks, and a run resumes by starting at a later index. A corpus with share w
    of the weights gives w · num_blocks blocks of the run, rounded by less than one, spread evenly over it. Its blocks
    come in a random order, new in each pass over the corpus; the tokens after its last whole block are left out.

    Args:
        streams: the corpora.
        weights: one per corpus, in any unit.
        sequence_length: tokens of a block.
        num_blocks: blocks of the run.
        seed: of the orders.
        document_mask: also return `position_ids` that restart at each document.

    Raises:
        DataError: a corpus shorter than one block, or one whose share is no block of the run.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        weights: Sequence[float],
        sequence_length: int,
        num_blocks: int,
        seed: int = 0,
        document_mask: bool = False,
    ) -> None:
        for stream in streams:
            if len(stream) < sequence_length:
                raise DataError(
                    f"corpus {stream.name!r} has {len(stream)} tokens, less than one block of {sequence_length}; "
                    "give more text or a shorter sequence_length"
                )
        self.streams = list(streams)
        self.sequence_length = sequence_length
        self.seed = seed
        self.document_mask = document_mask
        counts = blocks_per_corpus(weights, num_blocks)
        for stream, weight, count in zip(streams, weights, counts, strict=True):
            if count == 0:
                raise DataError(
                    f"corpus {stream.name!r} gets none of the run's {num_blocks} blocks: its weight of {weight:g} is "
                    f"{weight / sum(weights):.2g} of all; raise it, train on more tokens, or leave the corpus out"
                )
        self._corpus, self._ordinal = _interleave(counts)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._corpus)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Block `index`: `input_ids` (sequence_length,), and `position_ids` with a document mask."""
        corpus, ordinal = int(self._corpus[index]), int(self._ordinal[index])
        stream = self.streams[corpus]
        epoch, place = divmod(ordinal, len(stream) // self.sequence_length)
        start = int(self._order(corpus, epoch)[place]) * self.sequence_length
        stop = start + self.sequence_length
        block = {"input_ids": stream.tokens(start, stop)}
        if self.document_mask:
            block["position_ids"] = stream.positions(start, stop)
        return block

    def blocks(self) -> dict[str, int]:
        """How many blocks of the run come from each corpus."""
        counts = np.bincount(self._corpus, minlength=len(self.streams))
        return {stream.name: int(count) for stream, count in zip(self.streams, counts, strict=True)}

    def _order(self, corpus: int, epoch: int) -> np.ndarray:
        """The order of a corpus's blocks in one pass over it."""
        known_epoch, order = self._orders.get(corpus, (-1, np.empty(0)))
        if known_epoch != epoch:
            stream = self.streams[corpus]
            # By name, so that the order does not depend on which other corpora are in the mixture.
            generator = np.random.default_rng([self.seed, zlib.crc32(stream.name.encode()), epoch])
            order = generator.permutation(len(stream) // self.sequence_length)
            self._orders[corpus] = (epoch, order)
        return order


def blocks_per_corpus(weights: Sequence[float], num_blocks: int) -> list[int]:
    """Share num_blocks out by weight; each share is exact to less than one block (largest remainders)."""
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights) * num_blocks
    counts = np.floor(shares).astype(np.int64)
    leftover = num_blocks - int(counts.sum())
    counts[np.argsort(counts - shares, kind="stable")[:leftover]] += 1
    return [int(count) for count in counts]


def _interleave(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The corpus of each block, and its ordinal within that corpus; every corpus evenly spaced over the run."""
    corpus = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    ordinal = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    times = (ordinal + 0.5) / np.repeat(np.asarray(counts, dtype=np.float64), counts)
    order = np.argsort(times, kind="stable")
    return corpus[order], ordinal[order]
