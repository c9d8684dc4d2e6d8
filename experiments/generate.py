"""Complete the prompts of a file offline.

python -m experiments.generate --config=configs/story.py --prompts=prompts.json --max_tokens=32 --output_dir=out/story

FILE.json holds a JSON list of strings or lists of token ids. OUTPUT_DIR gets outputs.json (a list in the same order of
prompt_token_ids, token_ids, text, finish_reason and the seconds in each of the five stages), summary.json and
config.json (the resolved configuration). A prompt that can never run has finish_reason "error" and an `error` there,
does not disturb the others, and makes the exit code 1. With --config.engine.log_capacity=N also events.jsonl, for
experiments.timeline.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from absl import flags

from ds_jax.flags import define_config, load_config, run

define_config(default_file="configs/story.py")
_PROMPTS = flags.DEFINE_string("prompts", None, "JSON list of prompts: strings or lists of token ids.", required=True)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.", required=True)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 32, "Most tokens to generate per prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the smallest set of tokens that reaches this probability.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0 keeps all.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the random numbers; prompt i uses seed + i.")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on past the model's end token.")


def read_prompts(path: Path) -> list[str | list[int]]:
    """The prompts of a file.

    Raises:
        ValueError: it is not a JSON list of strings and lists of token ids; names the place.
    """
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"{path} must hold a JSON list of at least one prompt")
    for index, prompt in enumerate(prompts):
        ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not (ids or isinstance(prompt, str)):
            raise ValueError(f"{path}: prompts[{index}] must be a string or a list of token ids, got {prompt!r:.60}")
    return prompts


def main(argv: list[str]) -> None:
    """Generate and write the results."""
    config = load_config()
    prompts = read_prompts(Path(_PROMPTS.value))

    from ds_jax.sampling import SamplingParams

    base = SamplingParams(
        max_tokens=_MAX_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        top_k=_TOP_K.value,
        ignore_eos=_IGNORE_EOS.value,
    )

    # Only now the heavy imports: --help and a mistake in a flag answer at once.
    import dataclasses
    import time
    from statistics import median_low

    from ds_jax.llm import LLM
    from ds_jax.protocol import STAGES

    params = [dataclasses.replace(base, seed=_SEED.value + index) for index in range(len(prompts))]
    folder = Path(_OUTPUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    with LLM(config) as llm:
        begin = time.monotonic()
        outputs = llm.generate(prompts, params, errors="return")
        seconds = time.monotonic() - begin
        statistics = llm.engine.statistics()
        log = llm.engine.recorder.log()

    rows = [
        {
            "prompt_token_ids": output.prompt_token_ids,
            "token_ids": output.token_ids,
            "text": output.text,
            "finish_reason": output.finish_reason,
            "stages_s": output.stages_s or dict.fromkeys(STAGES, 0.0),
        }
        | ({"error": output.error} if output.error else {})
        for output in outputs
    ]
    _write(folder / "outputs.json", rows)
    _write(folder / "config.json", dataclasses.asdict(config))
    if config.engine.log_capacity:
        log.save(folder / "events.jsonl")
    failures = [output.error or "no reason is known" for output in outputs if output.finish_reason == "error"]
    for failure in failures:
        print(f"not served: {failure}", file=sys.stderr)
    if len(failures) == len(outputs):
        sys.exit(f"generate: no prompt could be served; {folder / 'outputs.json'} has the reasons")

    times = [output.times for output in outputs if output.times is not None]
    summary = {
        "requests": len(outputs),
        "failed": len(failures),
        "prompt_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "output_tokens": sum(len(output.token_ids) for output in outputs),
        "seconds": seconds,
        "output_tokens_per_s": sum(len(output.token_ids) for output in outputs) / seconds,
        "p50_ttft_s": median_low(one.ttft_ns / 1e9 for one in times if one.ttft_ns is not None),
        "p50_tpot_s": median_low(one.tpot_ns / 1e9 for one in times if one.tpot_ns is not None),
        "mean_stages_s": {stage: sum(one.stages_s()[stage] for one in times) / max(1, len(times)) for stage in STAGES},
        "compilations_while_serving": statistics["compilations_while_serving"],
    }
    _write(folder / "summary.json", summary)

    for name, value in summary.items():
        if not isinstance(value, dict):
            print(f"{name:28}{value:.6g}" if isinstance(value, float) else f"{name:28}{value}")
    for stage, mean_s in summary["mean_stages_s"].items():
        print(f"mean {stage:23}{mean_s * 1e3:.3f} ms")
    print(f"written to {folder}")
    if failures:
        sys.exit(1)


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
