"""The API process' side of the engine."""
