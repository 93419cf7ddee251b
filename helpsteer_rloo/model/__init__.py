"""Models: loading, scores and log-probabilities, sampling."""
