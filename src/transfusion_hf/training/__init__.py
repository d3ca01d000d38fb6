"""Training: the exact `Trainer`, whole checkpoints, callbacks, what is trained, and the doctor."""
