"""What a user runs: tasks, methods, runs and reports."""
