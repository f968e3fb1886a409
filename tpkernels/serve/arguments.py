"""The arguments of `tpkernels serve`, from whose fields its options are made (cli/options.py)."""

from __future__ import annotations

from dataclasses import dataclass

from tpkernels.generate.arguments import ModelArguments, option

SERVING = "Serving"  # a panel of the help
TOKEN_VARIABLE = "TPKERNELS_TOKEN"


@dataclass(frozen=True, kw_only=True)
class ServeArguments(ModelArguments):
    """The arguments of `tpkernels serve`, which their help describes; `drain_s` and `health_s` are seconds."""

    host: str = option("Address to listen on.", SERVING, default="127.0.0.1")
    port: int = option("Port; 0: a free one, which is printed.", SERVING, default=8000)
    token: str | None = option(
        "Bearer token that requests must bring; default none.", SERVING, default=None, envvar=TOKEN_VARIABLE
    )
    name: str | None = option("Of the model, in answers.", SERVING, default=None)
    slots: int = option("Sequences that are decoded together.", SERVING, default=8, min=1)
    queue: int = option("Requests that may wait; then 429.", SERVING, default=256, min=0)
    max_length: int = option("Tokens of a prompt and its answer together.", SERVING, default=2048, min=2)
    drain_s: float = option(
        "Seconds for running requests to end after SIGTERM.", SERVING, default=25.0, name="--drain", min=0.0
    )
    health_s: float = option(
        "Seconds that a step may take before /health says 503.", SERVING, default=20.0, name="--health", min=0.0
    )
