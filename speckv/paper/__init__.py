"""The paper's offline evaluation on its released data, and what it means in tokens per second."""
