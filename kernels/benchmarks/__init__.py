"""Speed, memory and compiled resources of memory_kernels, measured; no part of the package."""
