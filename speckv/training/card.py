"""A draft's card for people: what ``draft.json`` says, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..models.slice_draft import SliceManifest


def to_markdown(manifest: SliceManifest) -> str:
    """The card of a draft that `speckv.training.distill` made."""
    card = manifest.card
    corpus, training, held_out = card["corpus"], card["training"], card["held_out"]
    machine, recipe, seconds = card["machine"], card["recipe"], card["seconds"]
    gammas = list(held_out["acceptance"])
    rows = [("all", held_out["acceptance"]), *held_out["acceptance_by_task"].items()]
    predicted = held_out["predicted"]
    layers = ", ".join(map(str, manifest.layers))
    temperatures = _numbers(recipe["corpus"]["temperatures"])
    return "\n".join(
        [
            f"# A draft for {manifest.target}",
            "",
            f"{len(manifest.layers)} decoder layers that began as the target's layers {layers}, a "
            f"head of {manifest.vocab_size:,} tokens, the target's embeddings (not stored). It "
            "holds for that one target, and its license is the target's.",
            "",
            f"- Data: {corpus['sequences']:,} prompts, {card['written_prompts']:,} of them written "
            "by the target, all answered by it "
            f"({machine['compression']}, temperatures {temperatures} in turn), "
            f"{corpus['tokens']:,} response tokens.",
            f"- Training: {training['steps']:,} of {training['planned_steps']:,} steps, "
            f"{recipe['epochs']:g} epochs planned, learning rate "
            f"{recipe['training']['learning_rate']:g}; total variation plus "
            f"{recipe['training']['likelihood']:g} times the cross-entropy.",
            f"- Time: corpus {_duration(seconds['corpus'])}, search "
            f"{_duration(seconds['search'])}, training {_duration(seconds['training'])} on "
            f"{machine['device']}, {machine['threads']} threads; torch {machine['torch']}, "
            f"{card['date']}.",
            f"- Command: `{card['command']}`",
            "",
            f"Depth, head and best step were chosen on {corpus['validation_sequences']} responses "
            f"that it did not learn from; {corpus['held_out_sequences']} others were held out for "
            "what follows. Accepted share of the drafted tokens at a fixed γ, greedy:",
            "",
            "| task | " + " | ".join(f"γ={gamma}" for gamma in gammas) + " |",
            "| --- |" + " --- |" * len(gammas),
            *(_row(task, shares, gammas) for task, shares in rows),
            "",
            "Of the target's distribution at temperature 1 the draft's covers at least "
            f"{held_out['overlap_at_least']:.1%}: the mean over positions of these responses "
            f"(temperature {_numbers(held_out['temperatures'])}), counting the target's "
            f"{recipe['corpus']['top']} likeliest tokens alone. Predicted from costs measured "
            f"there: {predicted['speedup']:.2f}x plain decoding at γ={predicted['gamma']}.",
            "",
        ]
    )


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _row(task: str, shares: dict[str, Any], gammas: list[str]) -> str:
    return f"| {task} | " + " | ".join(f"{shares[gamma]:.1%}" for gamma in gammas) + " |"


def _duration(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
