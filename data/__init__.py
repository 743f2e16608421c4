"""Text to tokens to batches: tokenizers, Megatron `.bin/.idx` files, and one global order of
samples."""
