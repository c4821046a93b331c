"""What W&B and TensorBoard are told of a run: by a process beside rank 0, which training never waits for."""
