"""LAION-style shards to weights: reader, objective, a straight-line loop with exact resume, forking of experts."""
