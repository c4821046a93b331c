"""Where the first weights come from, tensor by tensor: a Qwen3 checkpoint, a saved model, a seed; and where they go."""
