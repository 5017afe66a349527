"""The architecture. This folder travels inside every exported checkpoint, so it imports torch and transformers only."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_bamoe import BamoeConfig
from .modeling_bamoe import BamoeForCausalLM, BamoeModel

AutoConfig.register(BamoeConfig.model_type, BamoeConfig, exist_ok=True)
AutoModel.register(BamoeConfig, BamoeModel, exist_ok=True)
AutoModelForCausalLM.register(BamoeConfig, BamoeForCausalLM, exist_ok=True)

__all__ = ["BamoeConfig", "BamoeForCausalLM", "BamoeModel"]
