"""The model in its roles: policy, EMA, reference."""

from transformers.utils import logging

logging.disable_progress_bar()  # a bar for each shard of weights would interrupt ours
