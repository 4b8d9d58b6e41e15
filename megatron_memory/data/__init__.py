"""Text to training batches: tokenizers, indexed datasets, and the order in which they are read.

`preprocess/` turns text into `.bin`/`.idx` files, `indexed/` writes, merges and splits these,
`index_files.py` checks them, `datasets.py` cuts them into samples, and `loader.py` hands out the
batches.
"""
