"""Interventions on the residual stream."""
