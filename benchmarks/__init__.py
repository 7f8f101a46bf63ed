"""Speed and memory: `python -m benchmarks`, or `make bench`."""
