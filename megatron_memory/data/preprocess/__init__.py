"""Text files to token files.

`inputs` says which files, `sources`, `streams` and `parquet` read them in `blocks`; `documents`,
`tokenizer`, `fast_bpe` and `encoding` make ids of a block, in the processes of `workers`; `outputs`
writes, `journal` and `identity` say what --resume may go on from; `pipeline` joins them.
"""
