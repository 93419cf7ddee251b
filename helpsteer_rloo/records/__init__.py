"""What stands beside the weights of a model, and what they were made with."""
