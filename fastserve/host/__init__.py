"""The machine and the terminal this runs on."""
