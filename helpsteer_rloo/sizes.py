"""How much the engine takes at once where no flag says it: its memory depends on that, and so does a plan of it."""

DEFAULT_TOKENS = 4096
DEFAULT_TOKENS_CPU = 1024
"""Tokens in a packed row, unless it is said: what keeps the hardware busy; more only costs memory."""
CHUNK = 256
"""Tokens whose logits exist at one time."""
ROW_TOKENS = 2048
"""Tokens of prompts that are read in one pass of sampling (a longer prompt alone); larger buffers only cost page
faults."""
PASS_TOKENS = 4096
"""Tokens in one forward pass that computes log-probabilities when a policy is judged."""
MOST_COPIED_BYTES = 2 * 2**30
"""Weights are copied for sampling if all of them together are no more than this; a part would cost memory and gain
little."""
MOST_SCORES = 2**19
"""On a CPU, scores in one tensor where a large block of attention is computed as products, or those of one query."""
SHORT = 128
"""On a CPU, most tokens of a prompt with a continuation in rows whose attention is computed range by range."""
