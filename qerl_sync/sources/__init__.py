"""Where the weights come from: metadata without a transfer, tensors when they are needed."""
