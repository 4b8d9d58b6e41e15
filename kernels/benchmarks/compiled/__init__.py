"""Kernels compiled without a GPU: the launches that ship, what each takes, what it may take."""
