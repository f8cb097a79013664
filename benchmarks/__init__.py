"""Speed against the peers and against the machine: `python -m benchmarks --help`. Not part of the package."""
