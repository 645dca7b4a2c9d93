"""Which request holds which KV block."""
