"""Models of the Hugging Face hub: names, what of a repository is fetched, the download, the cache."""
