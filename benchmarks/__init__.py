"""What is measured beside others and on this machine: `python -m benchmarks`, in a checkout."""
