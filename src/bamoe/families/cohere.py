"""Cohere (Command R): the parallel block of BAM's paper; one mean-centred norm, interleaved rotary pairs."""

from __future__ import annotations

from bamoe.families.family import Config, DenseFamily


def _refusals(config: Config) -> list[str]:
    return ["logit_scale null: give the factor on the logits"] if config.logit_scale is None else []


COHERE = DenseFamily(
    model_type="cohere",
    norm_eps=lambda config: config.layer_norm_eps,
    norm_type="layer_norm",
    parallel_block=True,
    rope_interleaved=True,
    projection_bias=lambda config: bool(config.attention_bias),
    output_bias=lambda config: bool(config.attention_bias),
    qk_norm=lambda config: "head" if config.use_qk_norm else None,
    logit_scale=lambda config: config.logit_scale,
    extra_refusals=_refusals,
)
