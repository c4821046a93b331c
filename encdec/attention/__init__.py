"""Attention over sequences of different lengths, without computing padding: how tokens lie, and who attends to what."""
