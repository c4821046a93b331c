"""The tools of ``python -m encdec.checkpoints``: one module each, all of them without GPU and process group."""
