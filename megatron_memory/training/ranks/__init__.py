"""A rank that dies or hangs is found, named by all others, and ends the run.

`beat` is what each rank tells the others about itself, `verdict` says from all of that which rank
is to blame, `watch` is the thread that tells, listens, and ends the process. `launcher` tells
NVIDIA's launcher of progress, where that has started the run.
"""
