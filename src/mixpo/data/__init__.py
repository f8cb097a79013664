"""Preference and demonstration data: reading, validation, splits, tokenization and batches."""
