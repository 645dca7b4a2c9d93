"""Virtual time: the very same engine and scheduler over a device that only takes its time."""
