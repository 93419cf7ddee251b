"""Training on TRL's trainers; the only part of the package that imports TRL."""
