"""The embedded default: a small task family with its verifier, on which a tiny model can be trained within minutes."""
