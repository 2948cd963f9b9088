"""What is added to a checkpoint: LoRA files and textual-inversion embeddings."""
