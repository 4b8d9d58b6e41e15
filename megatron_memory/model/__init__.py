"""The language model: Megatron-Core's GPT with memory layers in place of some FFNs."""
