"""What a perturbation may not do."""
