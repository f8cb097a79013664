"""Losses, estimators and statistics as pure functions on tensors and arrays, without models or files.

Losses are not reduced: the caller normalises over its whole batch. A mask is true for the entries that count.
"""
