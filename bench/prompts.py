"""Prompts of the benchmarks and of the losslessness grid: four tasks, five prompts each."""

from __future__ import annotations

PROMPTS: dict[str, list[str]] = {
    "code": [
        "Write a Python function that merges two sorted lists into one sorted list.",
        "Show how to read a CSV file line by line in Python and sum its second column.",
        "Write a function in C that reverses a string in place.",
        "Explain with code what a Python generator is and when to use one.",
        "Write an SQL query that lists each customer's latest order.",
    ],
    "math": [
        "A train covers 180 km in 2.5 hours. What is its average speed? Show each step.",
        "Solve the equation 3x + 7 = 2x - 5 and check the answer.",
        "What is the sum of the first 50 odd numbers? Explain why.",
        "A recipe for 4 people needs 300 g of flour. How much is needed for 7 people?",
        "Find the area of a triangle whose sides are 5, 12 and 13.",
    ],
    "chat": [
        "Give me three ideas for a rainy Sunday with two small children.",
        "How do I politely decline a meeting invitation?",
        "What should I keep in mind when I adopt a cat?",
        "Explain how a rainbow forms, for someone who is ten years old.",
        "I have a job interview tomorrow. How do I calm my nerves?",
    ],
    "summarization": [
        "Summarize in two sentences: The city council met on Tuesday to discuss the new bicycle "
        "lanes. Shop owners feared for their parking spaces, while cyclists asked for safer "
        "crossings. The council will test the lanes on two streets for six months.",
        "Summarize: Bees visit flowers for nectar and carry pollen from one to the next. Without "
        "them, many fruits and vegetables would not grow. Their number has fallen in many "
        "countries because of pesticides, disease and the loss of meadows.",
        "Give the main point in one sentence: The museum reopened after three years of work. Its "
        "oldest hall now has a glass roof, and the collection is ordered by theme instead of by "
        "century. Visitors praised the light but missed the old café.",
        "Summarize for a busy reader: The report finds that people who slept less than six hours "
        "made more mistakes the next day, but did not notice it themselves. A short nap helped "
        "with attention, though not with memory.",
        "Shorten this to one sentence: Our library will be closed from the first to the tenth of "
        "May for repairs. Books due in that time may be returned until the fifteenth without a "
        "fee, and the reading room in the town hall stays open.",
    ],
}


def all_prompts() -> list[str]:
    """Every prompt, the tasks taking turns."""
    return [prompt for group in zip(*PROMPTS.values(), strict=True) for prompt in group]
