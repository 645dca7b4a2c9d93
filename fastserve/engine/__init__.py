"""Turns the crank: the one loop between the scheduler and an executor, and its process."""
