"""The composition root: names the parts, and hands them to each other.

Rules: this is where the torch rooms and the core meet; what loads torch is imported inside the
functions that need it, so that the API process loads none. Must not know: how any part works.
"""
