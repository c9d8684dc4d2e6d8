"""Train the embedded model: a small Llama that tells stories, on text that a grammar makes up.

python -m experiments.train_story --output_dir=out/story
cp out/story/model/* models/embedded/story/

OUTPUT_DIR gets model/ (a Hugging Face folder), summary.json, samples.txt, losses.png (where matplotlib is installed)
and state.npz, from which the same command goes on after an interruption. Two cores that do nothing else take about
half a second a step; pip install -e .[train] brings what it needs.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from absl import flags, logging
from tqdm import tqdm

from ds_jax.architecture import Architecture
from ds_jax.flags import run

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the model and all about its training.", required=True)
_STEPS = flags.DEFINE_integer("steps", 2100, "Steps of the optimiser.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 1536, "Tokens in a step.", lower_bound=64)
_LENGTHS = flags.DEFINE_list(
    "lengths", ["256:0.72", "512:0.24", "1024:0.04"], "ROW LENGTH:SHARE OF THE STEPS, in order."
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "Its highest value, after the warm-up.", lower_bound=0.0)
_WARMUP = flags.DEFINE_integer("warmup", 100, "Steps over which the learning rate rises.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the initial weights and of the text.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of the weights in the model folder."
)
_SAVE_EVERY = flags.DEFINE_integer("save_every", 200, "Steps between two saves of model and state.", lower_bound=1)
_HIDDEN = flags.DEFINE_integer("hidden", 256, "Width of the model, a multiple of 32.", lower_bound=32)
_LAYERS = flags.DEFINE_integer("layers", 4, "Layers.", lower_bound=1)
_VOCABULARY = flags.DEFINE_integer("vocabulary", 2048, "Tokens of the tokenizer.", lower_bound=260)

PROMPTS = ("Once upon a time", "The little fox", "One day, a robot", "It was a dark night", "Hello", "In the forest")
REQUESTS = (
    "Tell me a story about a fox.", "Tell me a story about a rabbit named Toby and a red kite.", "Who are you?",
    "Tell me a short story about a pirate.", "Hello!", "What is the capital of France?",
    "A story about sharing, please.",
)  # fmt: skip
TOKENIZER_DOCUMENTS = 8000


def architecture() -> Architecture:
    """Eight query heads over four KV heads at the default width, so that tp may be 1, 2, 4 or 8."""
    heads = _HIDDEN.value // 32
    return Architecture(
        family="llama",
        vocab_size=_VOCABULARY.value,
        hidden_size=_HIDDEN.value,
        num_layers=_LAYERS.value,
        num_heads=heads,
        num_kv_heads=max(heads // 2, 1),
        head_dim=32,
        intermediate_size=_HIDDEN.value * 5 // 2,
        max_positions=1024,
        tie_embeddings=True,
    )


def stages(steps: int) -> list[tuple[int, int]]:
    """(length of the rows, step after the last) per stage. Short rows first: most stories fit, and attention is cheap.

    Raises:
        ValueError: --lengths cannot be read.
    """
    try:
        pairs = [(int(length), float(share)) for length, share in (entry.split(":") for entry in _LENGTHS.value)]
    except ValueError:
        raise ValueError(
            f"--lengths = {','.join(_LENGTHS.value)} must read LENGTH:SHARE,…, as in 320:0.9,640:0.1"
        ) from None
    whole, done, result = sum(share for _, share in pairs), 0.0, []
    for length, share in pairs:
        done += share
        result.append((length, round(steps * done / whole)))
    return result


def main(argv: list[str]) -> None:
    """Train, saving on the way, and describe the result."""
    import jax
    import jax.numpy as jnp
    from tokenizers import Tokenizer

    from experiments.story import data, export, training
    from experiments.story.forward import continue_greedily
    from experiments.story.tokenizer import END, end_id, train_tokenizer

    output, arch, steps = Path(_OUTPUT_DIR.value), architecture(), _STEPS.value
    (output / "model").mkdir(parents=True, exist_ok=True)
    plan = stages(steps)
    saved = output / "state.npz"
    # A run goes on with the tokenizer that it began with, also where the grammar has changed since.
    tokenizer: Tokenizer = (
        Tokenizer.from_file(str(output / "model" / "tokenizer.json"))
        if saved.exists()
        else train_tokenizer(data.texts(_SEED.value, TOKENIZER_DOCUMENTS), arch.vocab_size)
    )
    params = training.initial_params(arch, _SEED.value)
    optimizer = training.make_optimizer(_LEARNING_RATE.value, steps, _WARMUP.value)
    state = optimizer.init(params)
    first = 0
    losses: list[float] = []
    if saved.exists():
        first, losses, (params, state) = export.load_state(saved, params, state)
        logging.info("going on after step %d of %s", first, saved)

    def save(step: int) -> None:
        export.export(output / "model", arch, params, tokenizer, _DTYPE.value)
        export.save_state(saved, step, losses, params, state)

    train_step, begun = training.make_step(arch, optimizer), time.monotonic()
    with tqdm(total=steps, initial=first, unit="step", desc="training") as bar:
        for number, (length, last) in enumerate(plan):
            # A seed of its own for each stage and start, so that text goes on fresh after an interruption.
            source = data.batches(tokenizer, _stage_seed(number, first), max(_BATCH.value // length, 1), length + 1)
            for step in range(max(first, plan[number - 1][1] if number else 0), last):
                params, state, loss = train_step(params, state, jnp.asarray(next(source)))
                losses.append(float(loss))
                bar.update()
                bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", length=length)
                if (step + 1) % _SAVE_EVERY.value == 0:
                    save(step + 1)
    save(steps)

    held_out = next(data.batches(tokenizer, _stage_seed(999, 0), 8, 513))
    summary = {
        "parameters": arch.parameters(),
        "steps": steps,
        "tokens_per_step": _BATCH.value,
        "seconds": round(time.monotonic() - begun, 1),
        "seed": _SEED.value,
        "training_loss": round(_smooth(losses)[-1], 4),
        "held_out_loss": round(float(jax.jit(lambda rows: training.loss_of(arch, params, rows))(held_out)), 4),
        "bytes": sum(file.stat().st_size for file in (output / "model").iterdir()),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    texts = [*PROMPTS, *(f"<|user|>{request}{END}<|assistant|>" for request in REQUESTS)]
    prompts = [tokenizer.encode(text).ids for text in texts]
    answers = continue_greedily(arch, params, prompts, 250, end_id(tokenizer))
    samples = "\n\n---\n\n".join(text + tokenizer.decode(ids) for text, ids in zip(texts, answers, strict=True))
    (output / "samples.txt").write_text(samples + "\n")
    _plot(losses, output / "losses.png")
    print(samples, json.dumps(summary), sep="\n\n")


def _stage_seed(stage: int, first: int) -> int:
    return (_SEED.value * 1000 + stage) * 1_000_000 + first + 1


def _smooth(losses: list[float], window: int = 50) -> list[float]:
    """Mean of the last `window` losses, at every `window`-th step and at the end."""
    stops = [*range(window, len(losses), window), len(losses)]
    return [sum(losses[max(stop - window, 0) : stop]) / min(window, stop) for stop in stops]


def _plot(losses: list[float], file: Path) -> None:
    try:
        from matplotlib import pyplot
    except ImportError:
        logging.info("no figure of the loss: matplotlib is not installed")
        return
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(losses, linewidth=0.3, alpha=0.5)
    axes.plot([*range(50, len(losses), 50), len(losses)], _smooth(losses))
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    run(main)
