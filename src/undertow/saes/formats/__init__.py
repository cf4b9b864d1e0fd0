"""File formats of SAEs: one module for each library that writes them."""
