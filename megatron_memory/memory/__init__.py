"""The memory layers: routing to slots, the value tables, and the layers that read them.

Axes, one letter each in the whole project: T tokens, H heads, K values read per head, N half-keys,
S slots (N * N), D value dimension, C columns of it on this rank.
"""
