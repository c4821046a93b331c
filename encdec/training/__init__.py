"""Configuration, phases and the trainer. Importing this package imports no torch."""
