"""What a run will take, foreseen before anything is queued."""
