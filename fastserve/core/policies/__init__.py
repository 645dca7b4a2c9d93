"""Scheduling policies, one file each: a policy orders requests and keeps account of their time."""
