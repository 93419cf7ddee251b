"""What a command is given: knobs, TRL's flags beside them, and their checks. Nothing here imports torch."""
