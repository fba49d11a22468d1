"""The model in its roles: policy, EMA, reference."""
