"""transformers' `Trainer` for packed blocks: a schedule in tokens, router statistics, a log, validation per domain."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from bamoe.data.packing import PackedMixture
from bamoe.data.tokens import TokenStream
from bamoe.errors import BamoeError
from bamoe.evaluation.perplexity import evaluate_streams
from bamoe.evaluation.routing import router_statistics, update_statistics
from bamoe.modeling import BamoeConfig
from bamoe.training.collapse import ENOUGH_ASSIGNMENTS, CollapseWatch
from bamoe.training.config import TrainConfig
from bamoe.training.optimizer_state import OPTIMIZER_STATE, load_optimizer_state, save_optimizer_state
from bamoe.training.parallel import all_finite
from bamoe.training.trainable import TrainableParts


class BlockCollator:
    """Stacks blocks into a batch of `input_ids` and `labels` (B, T), and `position_ids` with a document mask.

    The Trainer saves the tokenizer found here beside every checkpoint. Given as its `processing_class` instead, it
    would also overwrite the model's special ids with the tokenizer's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, blocks: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        batch = {key: torch.from_numpy(np.stack([block[key] for block in blocks])) for key in blocks[0]}
        batch["labels"] = batch["input_ids"].clone()
        if "position_ids" in batch:
            # A document's first token has nothing of its own to be predicted from.
            batch["labels"][batch["position_ids"] == 0] = -100
        return batch


class BlockTrainer(Trainer):
    """Trains on a `PackedMixture` in its order, whatever the number of processes.

    Args:
        config: the run.
        validation: streams scored every `evaluate_every_tokens` and at the end.
    """

    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        config: TrainConfig,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: TrainingArguments,
        blocks: PackedMixture,
        validation: list[TokenStream],
        callbacks: list[TrainerCallback],
    ) -> None:
        self.config = config
        self.parts = TrainableParts(config, model)
        self.routers = router_statistics(model.config)
        self.router_losses: dict[str, list[torch.Tensor]] = {}
        self.dropped: torch.Tensor | None = None  # (layers, 2): assignments that were dropped, and all
        # The Trainer would refuse to checkpoint the optimizer of a model spread over processes; this one can.
        args.save_only_model = True
        super().__init__(
            model=model,
            args=args,
            data_collator=BlockCollator(tokenizer),
            train_dataset=blocks,
            eval_dataset=validation or None,
            callbacks=callbacks,
        )
        args.save_only_model = False
        self.collapse = CollapseWatch(warns=self.is_world_process_zero())
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # prints every log as a line
        if sys.stderr.isatty():
            self.add_callback(ProgressBar())

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The config's schedule, by the tokens seen at the end of each step; a resumed run goes on where it was."""
        config = self.config
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            for group in optimizer.param_groups:
                group["initial_lr"] = group["lr"]
            self.lr_scheduler = LambdaLR(
                optimizer,
                lambda step: config.schedule.factor(
                    (step + 1) * config.batch_tokens, config.steps * config.batch_tokens
                ),
                last_epoch=self.state.global_step - 1,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Nothing: the model was read from the checkpoint, in its parts where it is spread over processes."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Whole and by parameter name, so that any number of processes can go on; the schedule needs the step alone."""
        path = Path(output_dir) / OPTIMIZER_STATE
        save_optimizer_state(path, self.model, self.optimizer, write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_optimizer_state(Path(checkpoint) / OPTIMIZER_STATE, self.model, self.optimizer)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """One forward and backward pass, of which only the gradients that this stage trains with are left."""
        step = self.state.global_step
        self.parts.begin(step, self.model, self.optimizer)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.parts.drop_gradients(step, self.model)
        return loss

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The Trainer's own loss; also collects what the routers of a mixture did."""
        # With a cache, documents packed into one block would see each other.
        inputs = {**inputs, "use_cache": False} | ({"output_router_logits": True} if self.routers else {})
        if self.model.config.model_type == BamoeConfig.model_type:
            inputs["skip_logits"] = True
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.routers:
            update_statistics(self.routers, outputs)
            for name in ("aux_loss", "z_loss"):
                if (value := getattr(outputs, name, None)) is not None:
                    self.router_losses.setdefault(name, []).append(value.detach())
            self._count_dropped(outputs)
        return (loss, outputs) if return_outputs else loss

    def _count_dropped(self, outputs: Any) -> None:
        """Add the assignments that experts at their capacity did not take, where the model has capacities."""
        if (dropped := getattr(outputs, "dropped_assignments", None)) is None:
            return
        top_k = self.routers["feed_forward"].top_k or 0
        counts = torch.stack([
            torch.stack([layer.sum(), layer.new_tensor(top_k * len(logits))])
            for layer, logits in zip(dropped, outputs.router_logits, strict=True)
        ]).double()  # fmt: skip
        self.dropped = counts if self.dropped is None else self.dropped + counts

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens seen and router statistics to what the Trainer logs."""
        if "loss" in logs:
            logs["tokens"] = self.state.global_step * self.config.batch_tokens
            logs |= self._router_logs(logs["loss"])
        super().log(logs, start_time)

    def _router_logs(self, loss: float) -> dict[str, Any]:
        """Means since the last log, over all processes."""
        logs: dict[str, Any] = {}
        for name, values in self.router_losses.items():
            logs[name] = float(self.accelerator.reduce(torch.stack(values).mean(), "mean"))
        if logs:
            model_config = self.accelerator.unwrap_model(self.model).config
            coefficients = {"aux_loss": "router_aux_loss_coef", "z_loss": "router_z_loss_coef"}
            weighted = sum(getattr(model_config, coefficients[name], 0.0) * value for name, value in logs.items())
            logs["cross_entropy"] = loss - weighted
        judged_layers = {}
        for kind, statistics in self.routers.items():
            if statistics.sums is None:
                continue
            # Tensor-parallel processes have counted the same tokens.
            statistics.sums = self.accelerator.reduce(statistics.sums, "sum") / self.get_tp_size()
            # A soft router runs every expert, and the first step shows it as it was made.
            assigned = float(statistics.sums[-1].mean()) * (statistics.top_k or 0)
            for number, layer in enumerate(statistics.layers()):
                if self.state.global_step > 1 and assigned * min(layer.balanced_load) >= ENOUGH_ASSIGNMENTS:
                    judged_layers[f"{kind} router of layer {number}"] = layer
                prefix = f"{kind}_router/layer_{number}"
                logs[f"{prefix}/load_min"] = min(layer.load)
                logs[f"{prefix}/load_max"] = max(layer.load)
                logs[f"{prefix}/load_entropy"] = layer.load_entropy
                logs[f"{prefix}/token_entropy"] = layer.token_entropy
                if statistics.zero_computation is not None:
                    logs[f"{prefix}/experts_per_token"] = layer.experts_per_token
            statistics.sums = None
        self.router_losses.clear()
        return logs | self._dropped_logs() | self.collapse.logs(judged_layers, self.state.global_step)

    def _dropped_logs(self) -> dict[str, float]:
        """The share of the feed-forward assignments that were dropped, in all and by layer; nothing without limits."""
        if self.dropped is None:
            return {}
        dropped, assigned = self.accelerator.reduce(self.dropped, "sum").cpu().unbind(dim=1)
        self.dropped = None
        logs = {"dropped_assignments": float(dropped.sum() / assigned.sum())}
        for number, share in enumerate((dropped / assigned).tolist()):
            logs[f"feed_forward_router/layer_{number}/dropped_assignments"] = share
        return logs

    def _save_rng_state(self, output_dir: str) -> None:
        """Wait for the files of all processes: the one written next says that the checkpoint is whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Perplexity of every validation stream; every process computes all of it, so that all stay in step."""
        evaluation = evaluate_streams(
            self.model,
            eval_dataset or self.eval_dataset,
            self.config.sequence_length,
            batch_tokens=self.args.per_device_train_batch_size * self.config.sequence_length,
            document_mask=self.config.document_mask,
        )
        metrics = {
            f"{metric_key_prefix}_{name}_perplexity": score.perplexity for name, score in evaluation.domains.items()
        }
        metrics[f"{metric_key_prefix}_average_perplexity"] = evaluation.average_perplexity
        metrics["tokens"] = self.state.global_step * self.config.batch_tokens
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class RunLog(TrainerCallback):
    """Writes one JSON line per log and evaluation; after resuming, lines past the checkpoint are written anew."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.path.write_text("".join(_line(entry) for entry in state.log_history if "tokens" in entry))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        entry = state.log_history[-1]
        if state.is_world_process_zero and "tokens" in entry:
            with self.path.open("a") as file:
                file.write(_line(entry))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The last step is logged and evaluated even where it is no multiple of the interval.
        if state.global_step == state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
        # A checkpoint keeps no sums of the lines to come: it begins a new one, so that a resumed run logs the same.
        if control.should_save or state.global_step == state.max_steps:
            control.should_log = True


class StopOnDivergence(TrainerCallback):
    """Ends a run that diverged: at a logged loss that is not finite, and before such weights are evaluated or saved.

    So the weights of every checkpoint and of the final model are finite. All processes ask together and log
    the mean loss, so all of them stop at the same step.
    """

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        used = control.should_save or control.should_evaluate or state.global_step >= state.max_steps
        if used and model is not None and not all_finite(model):
            raise _diverged("the weights hold NaN or Inf", state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise _diverged(f"the loss is {loss}", state)


class ProgressBar(ProgressCallback):
    """transformers' bar over the steps, with the last losses beside it instead of a line for every log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = ("loss", "aux_loss", "eval_average_perplexity")
        if self.training_bar is not None:
            self.training_bar.set_postfix({key: f"{value:.4g}" for key, value in (logs or {}).items() if key in shown})


def _diverged(what: str, state: TrainerState) -> BamoeError:
    return BamoeError(
        f"{what} at step {state.global_step}: training diverged; lower learning_rate, or lengthen "
        "schedule.warmup_tokens"
    )


def _line(entry: dict[str, Any]) -> str:
    # A resumed Trainer has its history back with the keys in another order.
    first = ("step", "tokens")
    rest = sorted(entry.keys() - {*first, "epoch"})
    return json.dumps({key: entry[key] for key in (*first, *rest)}) + "\n"
