"""Language models and their residual streams."""
