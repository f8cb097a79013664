"""What the stages share: the optimizer step, the supervised loop, checkpoints, records."""
