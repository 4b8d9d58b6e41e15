"""What run.py measures: one module for each benchmark, and what they share.

Axes: T tokens, B rows read a token, S rows of the table, D columns, H heads, N half-keys, K slots
chosen a head, Dk the key's width.
"""
