"""What a defence is meant to remove, as a score that is positive where it holds."""
