"""A masked language model with mixtures of attention heads (MoA, section 4.2): `BamoeEncoderModel`, `BamoeForMaskedLM`.

Shapes: B batch, T tokens, D model width, V vocabulary, A attention experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MaskedLMOutput
from transformers.utils import can_return_tuple

from .configuration_bamoe_encoder import BamoeEncoderConfig
from .losses import RouterLosses, RouterLossMixin, router_losses
from .pretrained import real_tokens
from .transformer_blocks import TransformerEncoder, TransformerEncoderOutput, TransformerPreTrainedModel


@dataclass
class BamoeMaskedLMOutput(MaskedLMOutput):
    """Adds to the output the routers' losses, before their coefficients, summed over layers, and on request
    `attention_router_logits`: one (B·T, A) per layer, float32.

    `aux_loss` is the load-balance loss (1 per layer when uniform), `z_loss` the mean squared log-sum-exp.
    """

    aux_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    attention_router_logits: tuple[torch.Tensor, ...] | None = None


class BamoeEncoderModel(TransformerEncoder):
    """Embeddings and encoder layers."""

    config: BamoeEncoderConfig
    config_class = BamoeEncoderConfig

    def __init__(self, config: BamoeEncoderConfig):
        super().__init__(config)
        self.warn_of_task_blind_routers()


class MaskedLMHead(nn.Module):
    """A layer, a norm, and the embeddings as the last projection, with a bias (BERT, RoBERTa)."""

    def __init__(self, config: BamoeEncoderConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map hidden_states (..., D) to logits (..., V)."""
        logits: torch.Tensor = self.decoder(self.layer_norm(self.act_fn(self.dense(hidden_states))))
        return logits


class BamoeForMaskedLM(RouterLossMixin, TransformerPreTrainedModel):
    """`BamoeEncoderModel` with a head that fills in masked tokens; adds the router losses to its training loss."""

    config: BamoeEncoderConfig
    config_class = BamoeEncoderConfig
    _tied_weights_keys = {"lm_head.decoder.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: BamoeEncoderConfig):
        super().__init__(config)
        self.model = BamoeEncoderModel(config)
        self.lm_head = MaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The projection to logits."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the projection to logits."""
        self.lm_head.decoder = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> BamoeMaskedLMOutput:
        """Predict the tokens of input_ids (B, T) in place; with `labels` (B, T), -100 where none is asked for, the
        loss too.

        While training, the loss is cross-entropy + router_aux_loss_coef · load balance + router_z_loss_coef · z, over
        all tokens that `attention_mask` does not call padding; in evaluation mode it is the cross-entropy alone.

        Raises:
            ValueError: training a router whose gate is always 1 (top-1, renormalised): the task cannot train it.
        """
        training = self.trains_with(labels)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_router_logits=output_router_logits or training,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)

        loss, losses = None, None
        if training or output_router_logits:
            losses = self._router_losses(outputs, attention_mask, self.loss_group() if training else None)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if training and losses is not None:
                loss = self.add_router_losses(loss, losses, labels, kwargs.get("num_items_in_batch"))
        return BamoeMaskedLMOutput(
            loss=loss,
            logits=logits,
            aux_loss=None if losses is None else losses.load_balance,
            z_loss=None if losses is None else losses.z,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            attention_router_logits=outputs.attention_router_logits if output_router_logits else None,
        )

    def _router_losses(
        self,
        outputs: TransformerEncoderOutput,
        attention_mask: torch.Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> RouterLosses | None:
        """Losses of every router, if they select experts."""
        logits, top_k = outputs.attention_router_logits, self.config.num_attention_experts_per_tok
        if not logits or top_k is None:
            return None
        return router_losses(logits, top_k, real_tokens(attention_mask, outputs.last_hidden_state.shape[1]), group)


BamoeEncoderConfig.register_for_auto_class()
BamoeEncoderModel.register_for_auto_class("AutoModel")
BamoeForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")

__all__ = ["BamoeEncoderModel", "BamoeForMaskedLM"]
