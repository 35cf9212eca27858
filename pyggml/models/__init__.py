"""Model architectures: their graphs, hyperparameters and tensors. DeepSeek-2 only."""
