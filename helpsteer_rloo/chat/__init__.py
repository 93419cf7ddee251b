"""Answers of a policy, sampled for people who ask, and scored."""
