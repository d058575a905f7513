"""What a run records of some of its steps with `--trace`: when, how many bytes, how much memory."""
