"""The training step, its losses and optimizers, and the loop round it."""
