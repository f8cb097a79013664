"""One file a stage: a config and a pure function from it and its inputs to a folder."""
