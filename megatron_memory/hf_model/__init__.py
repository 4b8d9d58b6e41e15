"""A memory model for `transformers`: files that an exported folder has beside its weights.

They need torch and transformers only, and import nothing of this package.
"""
