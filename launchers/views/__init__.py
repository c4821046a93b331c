"""What a person sees of runs: their plan, their progress, their standing, their logs."""
