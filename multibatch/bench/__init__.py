"""Measurements of an artifact, each a file: variants of the ladder, latency, throughput, load, the seeds' tables, policies."""
