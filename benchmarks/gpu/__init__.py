"""What has to hold, and how fast it is, on a machine with one GPU: one command, ``python -m benchmarks.gpu``."""
