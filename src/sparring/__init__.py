"""Sparring aligns a language model by letting it spar with itself."""
