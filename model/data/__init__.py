"""Turning LLaVA JSON into batches."""
