"""What the training scripts in `scripts/` share."""
