"""Text to training batches: corpus, packed shards, global order, UL2 corruption, collation."""
