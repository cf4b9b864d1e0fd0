"""How the defended features are chosen."""
