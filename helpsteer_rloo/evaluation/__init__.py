"""Judging reward models and policies."""
