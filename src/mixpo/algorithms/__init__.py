"""The mathematics: pure functions on tensors and arrays. No models, no files, nothing of ours imported.

Losses are not reduced: the caller normalises over its whole batch. A mask is true where something counts.
"""
