"""A prompt file to pictures: read, plan, render part by part, keep a journal."""
