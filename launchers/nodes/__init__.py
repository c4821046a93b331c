"""What runs on the nodes of a job: one agent a node, its ranks, and what follows their end."""
