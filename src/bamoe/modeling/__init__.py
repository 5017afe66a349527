"""The architecture. This folder travels inside every exported checkpoint, so it imports torch and transformers only."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from .configuration_bamoe import BamoeConfig
from .configuration_bamoe_encoder import BamoeEncoderConfig
from .configuration_bamoe_encoder_decoder import BamoeEncoderDecoderConfig
from .modeling_bamoe import BamoeForCausalLM, BamoeModel
from .modeling_bamoe_encoder import BamoeEncoderModel, BamoeForMaskedLM
from .modeling_bamoe_encoder_decoder import BamoeEncoderDecoderModel, BamoeForConditionalGeneration

# Our configuration classes by their model types.
CONFIGS = {config.model_type: config for config in (BamoeConfig, BamoeEncoderConfig, BamoeEncoderDecoderConfig)}

for model_type, config in CONFIGS.items():
    AutoConfig.register(model_type, config, exist_ok=True)
AutoModel.register(BamoeConfig, BamoeModel, exist_ok=True)
AutoModel.register(BamoeEncoderConfig, BamoeEncoderModel, exist_ok=True)
AutoModel.register(BamoeEncoderDecoderConfig, BamoeEncoderDecoderModel, exist_ok=True)
AutoModelForCausalLM.register(BamoeConfig, BamoeForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(BamoeEncoderConfig, BamoeForMaskedLM, exist_ok=True)
AutoModelForSeq2SeqLM.register(BamoeEncoderDecoderConfig, BamoeForConditionalGeneration, exist_ok=True)

__all__ = [
    "CONFIGS",
    "BamoeConfig",
    "BamoeEncoderConfig",
    "BamoeEncoderDecoderConfig",
    "BamoeEncoderDecoderModel",
    "BamoeEncoderModel",
    "BamoeForCausalLM",
    "BamoeForConditionalGeneration",
    "BamoeForMaskedLM",
    "BamoeModel",
]
