"""What a model's files say, without torch."""
