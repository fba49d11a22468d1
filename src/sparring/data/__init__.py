"""What is trained on: chat templates, data sets, packing."""
