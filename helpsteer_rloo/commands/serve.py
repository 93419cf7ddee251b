"""`helpsteer-rloo serve`: a trained reward model behind HTTP."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from helpsteer_rloo.display.console import say
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.records.reward_model import check_reward_model
from helpsteer_rloo.settings.config import CommandSpec, Settings
from helpsteer_rloo.settings.parsing import parse_command

TOKEN_VARIABLE = "HELPSTEER_RLOO_API_KEY"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class ServeKnobs:
    """Which reward model is served, where, and how much is taken at once."""

    reward_model_dir: str = field(default="", metadata={"help": "Directory of the reward model."})
    name: str | None = field(
        default=None, metadata={"help": "Name of the model in answers (default: that of its directory)."}
    )
    host: str = field(
        default="127.0.0.1",
        metadata={"help": f"Address to listen on. One that others can reach needs a token in ${TOKEN_VARIABLE}."},
    )
    port: int = field(default=8000, metadata={"help": "Port to listen on; 0 takes any that is free."})
    batch_tokens: int = field(default=16_384, metadata={"help": "Tokens scored in one batch."})
    request_tokens: int = field(default=65_536, metadata={"help": "Most tokens of a request; more is refused (400)."})
    queue_tokens: int = field(default=262_144, metadata={"help": "Most tokens that wait; more is refused (429)."})
    body_megabytes: float = field(default=2.0, metadata={"help": "Largest body of a request; more is refused (413)."})
    timeout: float = field(
        default=60.0,
        metadata={"help": "Seconds after which a request is given up: its body (408), or its score (504)."},
    )
    batch_size: int = field(default=64, metadata={"help": "Responses scored in one forward pass."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the reward model."})


SERVE = CommandSpec(
    program="helpsteer-rloo serve",
    description="Serve a reward model over HTTP: /v1/score, OpenRLHF's /get_reward, vLLM's /classify and /pooling, "
    f"/health and /metrics. Requests bear the token in ${TOKEN_VARIABLE}, if it is set.",
    knobs=ServeKnobs,
)


def parse_serve(argv: Sequence[str] | None = None) -> Settings[ServeKnobs]:
    """Read the flags of the command."""
    return parse_command(SERVE, argv, checks=[check_serve])


def check_serve(settings: Settings[ServeKnobs]) -> None:
    """Check the flags.

    Raises:
        ValueError: one is missing or out of range, or others could reach the server without a token.
    """
    own = settings.own
    if not own.reward_model_dir:
        raise ValueError("--reward_model_dir is missing: which reward model is to be served?")
    for name in ("batch_tokens", "request_tokens", "queue_tokens", "body_megabytes", "timeout", "batch_size"):
        if not 0 < getattr(own, name) < float("inf"):
            raise ValueError(f"--{name} is {getattr(own, name)}; expected more than 0.")
    if own.queue_tokens < own.request_tokens:
        raise ValueError(
            f"--queue_tokens is {own.queue_tokens}; expected --request_tokens ({own.request_tokens}) or more."
        )
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"${TOKEN_VARIABLE} holds blanks or characters that no header takes.")
    if not 0 <= own.port < 2**16:
        raise ValueError(f"--port is {own.port}; expected 0 to 65535.")
    if own.host not in _LOOPBACK and not os.environ.get(TOKEN_VARIABLE):
        raise ValueError(
            f"--host {own.host} can be reached by others: set a token in ${TOKEN_VARIABLE}, which requests must bear."
        )


def run_serve(settings: Settings[ServeKnobs]) -> None:
    """Load the reward model and serve it until SIGINT or SIGTERM; requests being answered then are finished.

    Raises:
        ValueError: there is no usable reward model, or its scores depend on what is scored together.
        OSError: the address cannot be listened on.
    """
    own = settings.own
    record = check_reward_model(own.reward_model_dir, "--reward_model_dir", trusted=own.trust_remote_code)
    from helpsteer_rloo.model.forward import score_groups
    from helpsteer_rloo.model.loading import load_reward_model, own_renderer
    from helpsteer_rloo.model.memory import AtOnce
    from helpsteer_rloo.serving.app import build_app
    from helpsteer_rloo.serving.self_test import check_scores
    from helpsteer_rloo.serving.server import serve
    from helpsteer_rloo.serving.service import Limits

    renderer = own_renderer(own.reward_model_dir, record, "--reward_model_dir", trusted=own.trust_remote_code)
    model, _ = load_reward_model(own.reward_model_dir)
    limits = Limits(
        max_length=record["rendering"]["max_length"],
        request_tokens=own.request_tokens,
        batch_tokens=own.batch_tokens,
        queue_tokens=own.queue_tokens,
        body_bytes=int(own.body_megabytes * 2**20),
        timeout=own.timeout,
        batch_size=own.batch_size,
    )
    name = own.name or os.path.basename(os.path.abspath(own.reward_model_dir))
    token = os.environ.get(TOKEN_VARIABLE) or None
    at_once = AtOnce()

    def score(groups: Sequence[TokenGroup]) -> list[list[float]]:
        return at_once.run(partial(score_groups, model, groups), own.batch_size, 1)

    check_scores(score, model, renderer)
    app = build_app(name, score, renderer, limits, token)
    serve(app, own.host, own.port, lambda address: say(f"Serving {name} at {address}; Ctrl-C or SIGTERM ends it."))
    if app.state.batcher.is_busy:  # with what nobody waits for any more
        sys.stdout.flush()
        os._exit(0)
