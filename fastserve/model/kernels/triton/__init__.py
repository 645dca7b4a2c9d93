"""Triton kernels, and nothing else: what launches them stands in fastserve.model.triton_*.

Rules: half types are widened as they are loaded and arithmetic is float32; offsets that grow with
the pool or with the batch are 64-bit. Imported only where Triton is installed.
Must not know: networks, requests.
"""
