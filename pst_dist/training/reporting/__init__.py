"""What a training reports: metrics of each step, warnings, progress for other programs, and trackers."""
