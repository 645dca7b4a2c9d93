"""Who holds which KV block."""
