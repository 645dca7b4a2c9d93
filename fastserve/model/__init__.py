"""The network (torch room): weights, paged attention, sampling; it never hears of requests."""
