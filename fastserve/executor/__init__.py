"""Doing the work (torch room): carries out plans with a model and the KV it owns."""
