"""Where a run's time went, by its records alone."""
