"""What transformers says of a checkpoint without the weights that are others under a second name: nothing."""

import ast
import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_SAID = "There were missing keys in the checkpoint model loaded: "
"""What `transformers.Trainer` begins its warning with, a list of names and a full stop behind it."""


@contextmanager
def tied_weights_unsaid(model: Any) -> Generator[None]:
    """Within, a trainer does not warn that a checkpoint lacks weights if all of them are tied to others, which it has.

    A head that is tied to the embeddings is saved once, under the embeddings' name, and loaded with them.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())

    def is_worth_saying(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith(_SAID):
            return True
        return not tied.issuperset(ast.literal_eval(message.removeprefix(_SAID).removesuffix(".")))

    logger = logging.getLogger("transformers.trainer")
    logger.addFilter(is_worth_saying)
    try:
        yield
    finally:
        logger.removeFilter(is_worth_saying)
