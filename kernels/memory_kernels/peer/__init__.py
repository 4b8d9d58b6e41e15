"""PEER's lookup: many experts of one neuron each, chosen for each token."""

from memory_kernels.peer.interface import peer_experts

__all__ = ["peer_experts"]
