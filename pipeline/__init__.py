"""From a request to pictures and their files, and back: read text_to_image.py first."""
