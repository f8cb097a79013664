"""Rows, their validation, their sources, and their way into branch batches."""
