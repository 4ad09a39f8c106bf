"""What `recipes/benchmark.py` measures. Each case returns rows of its table."""
