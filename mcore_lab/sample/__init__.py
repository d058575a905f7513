"""What a checkpoint's model goes on with after a prompt: the same tokens on every layout."""
