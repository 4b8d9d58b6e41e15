"""Text from a trained model, by megatron-core's inference classes with a cache of keys and values.

`options` is what a user may ask for and `arguments` its flags, `saved_model` finds the checkpoint
and its configuration, `engine` is all that touches megatron-core's inference, and `generator` ties
them to the tokenizer.
"""
