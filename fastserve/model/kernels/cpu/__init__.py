"""Fused kernels of a step on a CPU: what they compute, two implementations, and their choice."""
