"""Training code shared by the stages: optimizer step, supervised loop, checkpoints, records."""
