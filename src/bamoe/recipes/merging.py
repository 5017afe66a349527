"""Ways to make one tensor of several experts' tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bamoe.checkpoints.plan import ReadRows, ShapeOf, Source, as_rows


@dataclass(frozen=True)
class Mean:
    """The uniform mean of tensors of one shape, taken in float32 (BAM, section 3; BTX, section 2.2)."""

    sources: tuple[Source, ...]

    def shape(self, shape_of: ShapeOf) -> tuple[int, int]:
        shapes = {shape_of(source) for source in self.sources}
        if len(shapes) != 1:
            raise ValueError(f"a mean of tensors of different shapes {sorted(shapes)}")
        return as_rows(shapes.pop())

    def rows(self, start: int, stop: int, read: ReadRows) -> torch.Tensor:
        # In bfloat16 the sum would lose bits, so it is taken in a float32 copy.
        total = read(self.sources[0], start, stop).to(torch.float32, copy=True)
        for source in self.sources[1:]:
            total += read(source, start, stop)
        return total.div_(len(self.sources))

    def describe(self) -> str:
        return f"mean of {', '.join(source.checkpoint for source in self.sources)}: {self.sources[0].tensor}"
