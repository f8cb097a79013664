"""Stages of an experiment, one file each: settings, inputs, and a function that writes a folder from them."""
