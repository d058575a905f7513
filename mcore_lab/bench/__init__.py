"""What is measured: medians and ratios of what ran side by side, in one process and one call."""
