"""One training run from its config to a finished model."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bamoe.errors import ConfigError
from bamoe.training.config import TrainConfig
from bamoe.training.run_folder import TRAINING_LOG, RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, TrainerCallback, TrainingArguments


@dataclass(frozen=True)
class TrainResult:
    """A finished run: the model's directory, the tokens and steps it took, the last logged loss, the log.

    `seconds` is the wall-clock time of the steps, over all parts of a resumed run, without evaluations and checkpoints.
    `dropped_assignments` is the last logged share of assignments that experts at their capacity did not take; None
    without capacities.
    """

    output: Path
    tokens: int
    steps: int
    final_loss: float
    log: Path
    seconds: float
    dropped_assignments: float | None = None


def train(
    config: TrainConfig | dict[str, Any] | str | Path,
    *,
    resume: bool = True,
    force: bool = False,
    callbacks: list[TrainerCallback] | None = None,
) -> TrainResult:
    """Continue the pre-training of a dense model or a mixture; the trained model is in `config.output` at the end.

    The same call goes on with an interrupted run, from its last checkpoint; on a CPU the final weights are then bit
    for bit those of a run that was never interrupted. Under `accelerate launch` or `torchrun`, call it in every
    process.

    Args:
        config: a TrainConfig, its keys and values, or a YAML file.
        resume: go on with an unfinished run found in the output; if false, refuse it.
        force: delete what an earlier run left in the output.
        callbacks: further callbacks for transformers' Trainer.

    Raises:
        BamoeError: a config, model, corpus or output directory that cannot be used, a loss or weights that are no
            longer numbers, or a full disk.
    """
    config = TrainConfig.read(config)
    folder = RunFolder(Path(config.output).expanduser())
    recorded = config.model_dump(mode="json")
    folder.check(recorded, resume, force)

    from bamoe.checkpoints.loading import check_vocabulary, load_config, load_model, load_tokenizer
    from bamoe.checkpoints.provenance import PROVENANCE_FILE
    from bamoe.checkpoints.reader import resolve
    from bamoe.data.packing import PackedMixture
    from bamoe.data.tokens import read_tokens
    from bamoe.training.optimizer_state import OPTIMIZER_STATE, KeptOptimizerState, save_optimizer_state
    from bamoe.training.parallel import ParallelismOnCpu, distributed_config
    from bamoe.training.stopwatch import Stopwatch
    from bamoe.training.trackers import closed, trackers
    from bamoe.training.trainable import check_trainable
    from bamoe.training.trainer import BlockTrainer, RunLog, StopOnDivergence

    reporting = trackers(config.report_to, folder.event_files)
    model_config = load_config(config.model)
    _check_model(config, model_config)
    check_trainable(config, model_config)
    tokenizer = load_tokenizer(config.model)
    check_vocabulary(tokenizer, model_config)
    arguments = _training_arguments(config, folder)
    spread = distributed_config(config, model_config, arguments.world_size)
    if spread is not None and spread.tp_size > 1 and arguments.use_cpu:
        arguments.parallelism_config = ParallelismOnCpu(tp_size=spread.tp_size, dp_shard_size=spread.fsdp_size)
    # One process tokenises, the others find its result in the cache of `datasets`.
    with arguments.main_process_first(desc="reading the corpora"):
        streams = [read_tokens(corpus, tokenizer) for corpus in config.data]
        validation = [read_tokens(corpus, tokenizer, count_bytes=True) for corpus in config.validation]
    blocks = PackedMixture(
        streams,
        [corpus.weight for corpus in config.data],
        config.sequence_length,
        config.steps * config.batch_tokens // config.sequence_length,
        config.seed,
        config.document_mask,
    )
    checkpoint = None if force else folder.last_checkpoint()
    model = load_model(checkpoint or config.model, config.dtype, spread)
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        if (value := getattr(config, name)) is not None:
            setattr(model.config, name, value)
    kept_state = []
    if config.optimizer_state == "keep":
        kept_state = [KeptOptimizerState(resolve(config.model) / OPTIMIZER_STATE, model)]
    stopwatch = Stopwatch()

    with ExitStack() as stack:
        with arguments.main_process_first(local=False, desc="preparing the output"):
            if arguments.process_index == 0:
                stack.enter_context(folder.held(recorded, resume, force))
        if folder.last_checkpoint() != checkpoint:
            raise ConfigError(f"another run has written to {folder.output} just now; give the command again")
        stack.enter_context(folder.full_disk_explained())
        stack.enter_context(closed(reporting))
        stack.enter_context(_no_bars_while_saving())
        trainer = BlockTrainer(
            config,
            model,
            tokenizer,
            arguments,
            blocks,
            validation,
            [
                RunLog(folder.checkpoints / TRAINING_LOG),
                *kept_state,
                *reporting,
                *(callbacks or []),
                stopwatch,
                StopOnDivergence(),  # last: it looks at what the others leave, and at what they ask to be saved
            ],
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_model(str(folder.staging))
        if config.keep_optimizer:
            state_file = folder.staging / OPTIMIZER_STATE
            save_optimizer_state(state_file, trainer.model, trainer.optimizer, write=arguments.process_index == 0)
        last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
        if arguments.process_index == 0:
            (folder.staging / "training_args.bin").unlink()  # a pickle; training_config.json says the same
            origin = resolve(config.model) / PROVENANCE_FILE
            if origin.is_file():
                shutil.copyfile(origin, folder.staging / PROVENANCE_FILE)
            folder.finish(config.keep_checkpoints)
        trainer.accelerator.wait_for_everyone()
    return TrainResult(
        output=folder.output,
        tokens=config.steps * config.batch_tokens,
        steps=config.steps,
        final_loss=last["loss"],
        log=folder.output / TRAINING_LOG,
        seconds=stopwatch.seconds,
        dropped_assignments=last.get("dropped_assignments"),
    )


@contextmanager
def _no_bars_while_saving() -> Iterator[None]:
    """Hide transformers' bar for each saved checkpoint, which would break up the one over the steps."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_model(config: TrainConfig, model_config: PreTrainedConfig) -> None:
    """Refuse, before any weight is read, what could not be trained."""
    longest = getattr(model_config, "max_position_embeddings", None)
    if longest is not None and config.sequence_length > longest:
        raise ConfigError(
            f"sequence_length ({config.sequence_length}) is more than the {longest} positions of {config.model}"
        )
    coefficients = [
        name for name in ("router_aux_loss_coef", "router_z_loss_coef") if getattr(config, name) is not None
    ]
    if unused := [name for name in coefficients if not hasattr(model_config, name)]:
        raise ConfigError(f"{', '.join(unused)}: {config.model} ({model_config.model_type}) has no such router loss")


def _training_arguments(config: TrainConfig, folder: RunFolder) -> TrainingArguments:
    """The config in transformers' terms, for this number of processes."""
    import torch
    from transformers import TrainingArguments

    # Renamed in transformers 5.2x; the old name warns there, the new one is unknown before.
    known = TrainingArguments.__dataclass_fields__
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.max_grad_norm,
        use_cpu=not torch.accelerator.is_available(),
        bf16=config.autocast == "bfloat16",
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        use_cache=True,  # saved with the model; the trainer passes use_cache=False itself
        logging_steps=config.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=False,
        report_to="none",
        save_strategy="steps",
        save_steps=config.steps_in(config.save_every_tokens or config.tokens // 10),
        save_total_limit=None if config.keep_checkpoints else 1,
        eval_strategy="steps" if config.validation else "no",
        eval_steps=config.steps_in(config.evaluate_every_tokens or config.tokens),
        **{checkpointing: config.gradient_checkpointing},
    )
    if arguments.device.type == "cuda":
        # One process drives one GPU; several GPUs take several processes (accelerate launch).
        arguments._n_gpu = 1
    # Tensor-parallel processes work on the same tokens.
    processes = max(1, arguments.world_size // (config.parallel.tensor if config.parallel else 1))
    per_process, uneven = divmod(config.batch_tokens, processes)
    micro = config.micro_batch_tokens or per_process
    if uneven or per_process % micro or micro % config.sequence_length:
        raise ConfigError(
            f"batch_tokens ({config.batch_tokens}) must divide over {processes} processes into forward "
            f"passes of {config.micro_batch_tokens or 'whole'} micro_batch_tokens, in blocks of "
            f"{config.sequence_length} tokens"
        )
    arguments.per_device_train_batch_size = micro // config.sequence_length
    arguments.gradient_accumulation_steps = per_process // micro
    return arguments
