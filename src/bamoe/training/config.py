"""What a person writes to describe a training run, as a strict YAML model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from bamoe.data.corpora import Corpus
from bamoe.schema import StrictModel, load, parse


class WeightedCorpus(Corpus):
    """A training corpus; `weight` is its share of the tokens, in any unit."""

    weight: PositiveFloat = Field(1.0, allow_inf_nan=False)


class Schedule(StrictModel):
    """The learning rate over the run: a linear warm-up, then a decay to `final` times the peak."""

    warmup_tokens: int = Field(0, ge=0)
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    final: float | None = Field(None, ge=0, le=1, description="default 0.1")

    @model_validator(mode="after")
    def _complete(self) -> Schedule:
        if self.decay == "constant":
            if self.final is not None:
                raise ValueError("a constant schedule has no final value; leave final out")
        elif self.final is None:
            self.final = 0.1
        return self

    def factor(self, seen: int, total: int) -> float:
        """The learning rate, as a share of its peak, of the step that ends when `seen` of `total` tokens are seen."""
        if seen < self.warmup_tokens:
            return seen / self.warmup_tokens
        if self.final is None:
            return 1.0
        progress = min(1.0, (seen - self.warmup_tokens) / max(1, total - self.warmup_tokens))
        remaining = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.final + (1 - self.final) * remaining


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# One word, or a list of words; see bamoe.training.trainable for what belongs to which.
Trainable = Annotated[
    list[Literal["all", "routers", "experts", "shared"]], BeforeValidator(_listed), Field(min_length=1)
]


class Stage(StrictModel):
    """A part of the run in which only some parameters train. A step belongs to the stage in which it begins."""

    trainable: Trainable
    until_tokens: PositiveInt | None = Field(None, description="of the run; the last stage goes to its end")
    reset_optimizer: bool = Field(
        False, description="what starts to train here forgets the optimizer state of an earlier stage"
    )


class Parallel(StrictModel):
    """How a model is spread over the processes of a run, of which there are `tensor` times `fsdp`."""

    tensor: PositiveInt = Field(1, description="processes that share the heads and feed-forward widths of one batch")
    fsdp: PositiveInt | None = Field(
        None, description="processes that shard weights and optimizer state over their batches; default: all there are"
    )
    expert: PositiveInt = Field(1, description="of all of them: those among which the feed-forward experts are divided")


class TrainConfig(StrictModel):
    """A training run: continued pre-training of a dense model or a mixture on weighted corpora.

    Token counts are of all processes together. A run takes `tokens // batch_tokens` whole steps; tokens that do not
    fill a last step are not trained on. Paths are relative to the working directory.
    """

    model: str = Field(min_length=1, description="dense or mixture: a directory, or a hub id")
    output: str = Field(min_length=1)
    data: list[WeightedCorpus] = Field(min_length=1)
    sequence_length: int = Field(ge=2)
    tokens: PositiveInt
    batch_tokens: PositiveInt = Field(description="tokens of one optimizer step")
    learning_rate: PositiveFloat = Field(allow_inf_nan=False, description="the peak")
    schedule: Schedule = Field(default_factory=Schedule)
    seed: int = Field(0, ge=0, lt=2**32)

    trainable: Trainable = Field(["all"])
    stages: list[Stage] = Field(default_factory=list, description="instead of trainable: what trains when")
    optimizer_state: Literal["reset", "keep"] = Field(
        "reset", description="keep: start from the state that the model's own run left (keep_optimizer)"
    )

    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(1.0, ge=0, description="0 does not clip")
    micro_batch_tokens: PositiveInt | None = Field(
        None, description="tokens of one forward pass on one process; the rest of a batch is accumulated"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights while training")
    autocast: Literal["bfloat16"] | None = Field(None, description="compute in bfloat16 with float32 weights")
    parallel: Parallel | None = Field(None, description="spread the model over the processes; default: a copy in each")
    gradient_checkpointing: bool = False
    document_mask: bool = Field(False, description="documents packed into one block do not see each other")
    router_aux_loss_coef: float | None = Field(None, ge=0, allow_inf_nan=False, description="default: the model's")
    router_z_loss_coef: float | None = Field(None, ge=0, allow_inf_nan=False, description="default: the model's")

    validation: list[Corpus] = Field(default_factory=list)
    evaluate_every_tokens: PositiveInt | None = Field(None, description="default: at the end only")
    log_every_steps: PositiveInt = 10
    save_every_tokens: PositiveInt | None = Field(None, description="default: ten times over the run")
    keep_checkpoints: bool = Field(False, description="keep all of them, also after the run")
    keep_optimizer: bool = Field(False, description="leave the optimizer state beside the model")
    report_to: list[str] = Field(["tensorboard"], description="trackers, as in transformers")

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        self._check_multiple("batch_tokens", "sequence_length")
        self._check_multiple("micro_batch_tokens", "sequence_length")
        if self.micro_batch_tokens is not None and self.batch_tokens % self.micro_batch_tokens:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must be a multiple of "
                f"micro_batch_tokens ({self.micro_batch_tokens})"
            )
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens ({self.tokens}) is less than one step of batch_tokens ({self.batch_tokens})")
        if self.schedule.warmup_tokens > self.tokens:
            raise ValueError(
                f"schedule.warmup_tokens ({self.schedule.warmup_tokens}) is more than tokens ({self.tokens})"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and less than 1, found {list(self.betas)}")
        if self.evaluate_every_tokens is not None and not self.validation:
            raise ValueError("evaluate_every_tokens needs validation: a list of {name, path}")
        if self.autocast is not None and self.dtype != "float32":
            raise ValueError(f"autocast is for float32 weights; dtype is {self.dtype}")
        for key, corpora in (("data", self.data), ("validation", self.validation)):
            _check_names(key, corpora)
        self._check_stages()
        self._check_output()
        return self

    def _check_stages(self) -> None:
        for key, words in [("trainable", self.trainable), *(("stages", stage.trainable) for stage in self.stages)]:
            if len(set(words)) < len(words) or (len(words) > 1 and "all" in words):
                raise ValueError(f"{key}: name each part once, and all alone, found {words}")
        if not self.stages:
            return
        if self.trainable != ["all"]:
            raise ValueError("stages say what trains; leave trainable out")
        *earlier, last = self.stages
        if last.until_tokens is not None or any(stage.until_tokens is None for stage in earlier):
            raise ValueError("every stage but the last needs until_tokens, and the last has none")
        if self.stages[0].reset_optimizer:
            raise ValueError("stages.0.reset_optimizer: the first stage starts as optimizer_state says")
        starts = [*self.stage_starts, self.steps]
        if any(end <= start for start, end in pairwise(starts)):
            ends = [stage.until_tokens for stage in earlier]
            raise ValueError(
                f"stages: until_tokens must grow, by one step of batch_tokens ({self.batch_tokens}) at least, and "
                f"leave one for the last stage, found {ends} of {self.tokens} tokens"
            )

    @property
    def stage_starts(self) -> list[int]:
        """The step, counted from 0, with which each stage begins; a run without stages is one stage."""
        ends = [stage.until_tokens for stage in self.stages if stage.until_tokens is not None]
        return [0, *(math.ceil(end / self.batch_tokens) for end in ends)]

    def _check_multiple(self, larger: str, smaller: str) -> None:
        value, unit = getattr(self, larger), getattr(self, smaller)
        if value is not None and value % unit:
            below = value // unit * unit
            near = f"{below} or {below + unit}" if below else f"{unit}"
            raise ValueError(f"{larger} ({value}) must be a multiple of {smaller} ({unit}), for instance {near}")

    def _check_output(self) -> None:
        # `--force` deletes the output, which must not take an input with it.
        output = Path(self.output).expanduser().resolve()
        inputs = [self.model, *(corpus.path for corpus in (*self.data, *self.validation))]
        for name in inputs:
            if Path(name).expanduser().resolve().is_relative_to(output):
                raise ValueError(f"output {self.output} holds the input {name}; choose another output")

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.tokens // self.batch_tokens

    def steps_in(self, tokens: int) -> int:
        """Steps after which `tokens` are seen, at least one."""
        return max(1, round(tokens / self.batch_tokens))

    @classmethod
    def read(cls, source: TrainConfig | dict[str, Any] | str | Path) -> TrainConfig:
        """A config from a YAML file or plain data. Raises ConfigError naming every problem."""
        if isinstance(source, TrainConfig):
            return source
        return parse(source, cls, "training config") if isinstance(source, dict) else load(source, cls)


def _check_names(key: str, corpora: Sequence[Corpus]) -> None:
    names = [corpus.name for corpus in corpora]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"names in {key} must differ; repeated: {', '.join(repeated)}")
