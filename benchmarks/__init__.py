"""Cost and agreement, run by hand; `python -m benchmarks.<name> --help`."""
