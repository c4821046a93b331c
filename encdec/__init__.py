"""A Qwen3 encoder-decoder trained with UL2 denoising: model, data, training, checkpoints."""

__version__ = "0.1.0"
