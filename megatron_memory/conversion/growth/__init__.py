"""More memory for a trained model, without starting again.

| module | what it does |
|---|---|
| `tensors` | which tensors are a memory's; lazy tensors made of others |
| `fresh` | a fresh training's initial values |
| `add` | a dense model becomes one with memory |
| `half_keys` | more rows: N half-keys become 2N |
| `value_dim` | wider rows |
| `probe` | the model before and after on the same tokens |
| `command` | one change from its options to its report |

`add`, `half_keys` and `value_dim` are functions from a `SavedState` to a `SavedState`; nothing is
read before it is written.
"""
