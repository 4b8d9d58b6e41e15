"""`.bin`/`.idx` pairs as files: their format, and writing them so that no half of one is ever seen.

Nothing here imports torch or megatron-core, which take seconds to load.
"""
