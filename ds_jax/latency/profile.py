"""A latency profile: all that is known of one model on one kind of device, as a value and as a JSON file."""

from __future__ import annotations

import dataclasses
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_jax.latency.fitted import FittedStepTime, StepFit

FORMAT = 1
CHECKOUT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class LatencyProfile:
    """Step times by tensor parallelism, copies and memory of one model in one dtype on one kind of device."""

    device: str
    model: str
    dtype: str
    fits: dict[int, StepFit]
    """Coefficients by tensor parallelism."""
    date: str = ""
    source: str = ""
    """Where the figures come from."""
    saturation_tokens: dict[int, int] = field(default_factory=dict)
    """L_m by tensor parallelism; one that is missing is worked out from the fit."""
    kv_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of KV that an instance holds, by "tp,pp"."""
    kv_bytes_per_token: int = 0
    """Bytes of KV of one token, over all layers and heads."""
    copy_bytes_per_s: float = 0.0
    """Bandwidth of a KV copy between two instances; 0: not measured."""
    copy_latency_s: float = 0.0
    """What a copy takes beside its bytes."""
    host_bytes_per_s: float = 0.0
    """Bandwidth of a KV copy to host memory; 0: not measured."""
    host_overhead_s: float = 0.0
    """Host's time per step that devices wait for, and that the fits do not contain."""
    extrapolated: bool = False
    """Worked out from a device's published figures, never measured."""
    outside: dict[str, str] = field(default_factory=dict, compare=False)
    """What was asked beyond the measured ranges, the first of each kind: for the summary of a run. Not in the file."""

    def fit_of(self, tp: int) -> StepFit:
        """Coefficients of this tensor parallelism.

        Raises:
            ValueError: it was not measured.
        """
        if tp not in self.fits:
            known = ", ".join(map(str, sorted(self.fits)))
            raise ValueError(
                f"tp = {tp} is not in the latency profile of {self.model} on {self.device}: it has {known}"
            )
        return self.fits[tp]

    def step_time(self, tp: int, pp: int = 1) -> FittedStepTime:
        """Step times of an instance with this parallelism. Asked outside a measured range it warns once, and `outside`
        names what was asked.

        Raises:
            ValueError: the tensor parallelism was not measured.
        """
        return FittedStepTime(self.fit_of(tp), pp, self._left_range)

    def l_m(self, tp: int) -> int:
        """Shortest prompt that saturates an instance with this tensor parallelism, in tokens."""
        return self.saturation_tokens.get(tp) or self.fit_of(tp).saturation_tokens()

    def _left_range(self, kind: str, what: str) -> None:
        if kind not in self.outside:
            self.outside[kind] = what
            warnings.warn(f"latency profile of {self.model} on {self.device}: {what}", RuntimeWarning, stacklevel=3)

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        record = {"format": FORMAT, **dataclasses.asdict(self)}
        del record["outside"]
        for name in ("fits", "saturation_tokens"):
            record[name] = {str(tp): value for tp, value in record[name].items()}
        for fit in record["fits"].values():
            for name in ("prompt_tokens", "batch", "context_tokens"):
                fit[name] = [None if bound == float("inf") else bound for bound in fit[name]]
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load(path: str | Path) -> LatencyProfile:
    """Read a profile that `LatencyProfile.save` wrote: a path from the working folder, or else from the checkout.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a latency profile; one sentence with the file and the field.
    """
    found = next((one for one in (Path(path), CHECKOUT / path) if one.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"latency profile {path} does not exist")
    try:
        record = json.loads(found.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
        raise ValueError(f"{path}: not a latency profile: format must be {FORMAT}")
    try:
        fits = {int(tp): _fit(fit) for tp, fit in record.pop("fits").items()}
        saturation = {int(tp): int(tokens) for tp, tokens in record.pop("saturation_tokens", {}).items()}
        return LatencyProfile(fits=fits, saturation_tokens=saturation, **record)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a latency profile: {error}") from error


def _fit(record: dict[str, Any]) -> StepFit:
    values = dict(record)
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple([float("inf") if bound is None else bound for bound in value])
    for name in ("prefill", "decode", "decode_large"):
        if values.get(name) is not None and len(values[name]) != 3:
            raise ValueError(f"{name} = {values[name]} must be three coefficients")
    return StepFit(**values)
