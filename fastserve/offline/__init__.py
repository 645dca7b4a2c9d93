"""What `LLM` takes and gives, with the names of vLLM and transformers."""
