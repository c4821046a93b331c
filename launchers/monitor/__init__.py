"""A live view of all runs in a terminal: Slurm asked once in a while for all of them, their directories read on."""
