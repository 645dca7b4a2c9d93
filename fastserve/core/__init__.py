"""The pure room: decides everything and does nothing (no torch, no clock, no I/O)."""
