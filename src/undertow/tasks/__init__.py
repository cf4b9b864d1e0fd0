"""Audits that come with data."""
