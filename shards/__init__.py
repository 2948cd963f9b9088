"""LAION-style tar shards: found, checked, filtered, described, read by offset, written."""
