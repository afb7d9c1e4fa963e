"""Verify, time, sweep."""
