"""Naive MoE styles with one thing changed: each mutant must compile to its own meaning or stay as it is."""
