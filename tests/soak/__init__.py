"""Long trials of what must never happen: silent damage, lost training, growing memory.

`make test-slow` runs them whole, `make test` a tenth of each (`rounds`).
"""
