"""A trained reward model behind HTTP."""
