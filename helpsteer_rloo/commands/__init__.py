"""The sub-commands of `helpsteer-rloo`: flags, checks, and one function that does the work."""
