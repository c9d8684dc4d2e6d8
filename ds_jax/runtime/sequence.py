"""One sequence as the host knows it: the token values behind the ids that planning deals in."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds_jax.sampling import SamplingParams, TokenLogprobs


@dataclass
class Sequence:
    """Tokens known to the host, and how to choose the next.

    The engine appends to `output` when a step is done; programs are fed from prompt + output.
    """

    id: int
    prompt: list[int]
    sampling: SamplingParams
    seed: int
    """Of this request's random numbers: `sampling.seed`, or the one drawn in its place."""
    index: int = 0
    """Which of the request's sequences this is; part of the random numbers' key."""
    output: list[int] = field(default_factory=list)
    end_ids: tuple[int, ...] = ()
    """Tokens that end a text, the model's and the request's: they must not come before `sampling.min_tokens`."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """Of the prompt's tokens from the second on, as far as they are known, if they are asked for."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def last(self) -> int:
        """The newest token."""
        return self.output[-1] if self.output else self.prompt[-1]

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt + output.

        Raises:
            ValueError: `stop` lies beyond what is known.
        """
        if stop > len(self):
            raise ValueError(f"sequence {self.id} has {len(self)} tokens, [{start}, {stop}) were asked for")
        prompt = len(self.prompt)
        if stop <= prompt:
            return self.prompt[start:stop]
        return self.prompt[start:] + self.output[max(start - prompt, 0) : stop - prompt]

    def unscored(self, start: int, stop: int) -> range:
        """The places of tokens [start, stop) behind which a prompt token stands whose log-probability is asked for
        and not known yet. None once there is output: then the prompt is run for another time."""
        if self.sampling.prompt_logprobs is None or self.output:
            return range(start, start)
        first = max(start, len(self.prompt_logprobs))
        return range(first, max(first, min(stop, len(self.prompt) - 1)))
