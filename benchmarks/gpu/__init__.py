"""Measurements on one GPU, in parts of under five minutes: `run.sh right|seven|peers|hh`."""
