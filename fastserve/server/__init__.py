"""The HTTP face: OpenAI's shapes over an engine in another process. No torch."""
