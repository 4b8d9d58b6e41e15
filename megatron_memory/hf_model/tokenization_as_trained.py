# Copyright 2026 The megatron-memory authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that the model was trained with, exactly as tokenizer.json describes it.

transformers 5 builds the tokenizer of some families anew, by rules of the family, and takes only
the vocabulary from tokenizer.json. That this file is named in tokenizer_config.json keeps it from
doing so, whether or not `trust_remote_code` is given.
"""

from transformers import PreTrainedTokenizerFast


class TokenizerAsTrained(PreTrainedTokenizerFast):
    """tokenizer.json and nothing else."""
