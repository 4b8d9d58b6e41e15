"""What is in a checkpoint of any format, and how two differ. Every tensor is read by blocks.

| module | what it does |
|---|---|
| `formats` | which format a folder has |
| `files` | the tensors by the names of the files, as far as these are whole |
| `contents` | a checkpoint that is open: by our names where it can be read as a model |
| `figures` | a tensor's norm, mean, extremes, and rows of its that are dead or repeated |
| `difference` | two checkpoints: settings, names, numbers |
| `findings` | what the figures of all tensors say together: damage, duplicates, dead things |
| `parameters` | how many of which kind |
| `slot_usage` | how evenly slots were read |
| `program`, `report` | `tools/inspect_checkpoint.py`, from its options to its text |
"""
