"""The network (torch room): weights, layers, paged attention, sampling; it never hears of requests."""
