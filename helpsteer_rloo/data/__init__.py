"""Preferences as rows: where they come from, what becomes of them, and the demo's own."""
