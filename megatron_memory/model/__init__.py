"""The language model: Megatron-Core's GPT with memories in place of some MLPs or beside them."""
