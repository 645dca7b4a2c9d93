"""What the server and `LLM` share at their doors."""
