"""A draft's card for people: what ``draft.json`` says, as Markdown."""

from __future__ import annotations

from typing import Any

from ..models.slice_draft import SliceManifest


def to_markdown(manifest: SliceManifest) -> str:
    """The card of a draft that `speckv.training.distill` made."""
    card = manifest.card
    corpus, training, held_out = card["corpus"], card["training"], card["held_out"]
    machine, recipe = card["machine"], card["recipe"]
    gammas = list(held_out["acceptance"])
    rows = [("all", held_out["acceptance"]), *held_out["acceptance_by_task"].items()]
    predicted = held_out["predicted"]
    layers = ", ".join(map(str, manifest.layers))
    temperatures = ", ".join(f"{t:g}" for t in recipe["corpus"]["temperatures"])
    return "\n".join(
        [
            f"# A draft for {manifest.target}",
            "",
            f"{len(manifest.layers)} decoder layers that began as the target's layers {layers}, a "
            f"head of {manifest.vocab_size:,} tokens, the target's embeddings (not stored). It "
            "holds for that one target, and its license is the target's.",
            "",
            f"- Data: {corpus['sequences']:,} prompts answered by the target itself "
            f"({machine['compression']}, temperatures {temperatures} in turn), "
            f"{corpus['tokens']:,} response tokens.",
            f"- Training: {training['steps']:,} of {training['planned_steps']:,} steps, "
            f"{recipe['epochs']:g} epochs planned, learning rate "
            f"{recipe['training']['learning_rate']:g}; total variation plus "
            f"{recipe['training']['likelihood']:g} times the cross-entropy.",
            f"- Time: {_duration(card['seconds'])} on {machine['device']}, {machine['threads']} "
            f"threads; torch {machine['torch']}, {card['date']}.",
            f"- Command: `{card['command']}`",
            "",
            f"Held out were {corpus['held_out_sequences']} responses. Accepted share of the "
            "drafted tokens at a fixed γ, greedy:",
            "",
            "| task | " + " | ".join(f"γ={gamma}" for gamma in gammas) + " |",
            "| --- |" + " --- |" * len(gammas),
            *(_row(task, shares, gammas) for task, shares in rows),
            "",
            f"Mean acceptance of a first draft token under sampling at temperature 1: "
            f"{held_out['overlap']:.1%}. Predicted from costs measured there: "
            f"{predicted['speedup']:.2f}x plain decoding at γ={predicted['gamma']}.",
            "",
        ]
    )


def _row(task: str, shares: dict[str, Any], gammas: list[str]) -> str:
    return f"| {task} | " + " | ".join(f"{shares[gamma]:.1%}" for gamma in gammas) + " |"


def _duration(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
