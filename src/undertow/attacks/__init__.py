"""Ways to search for a perturbation, and the arms of an audit."""
