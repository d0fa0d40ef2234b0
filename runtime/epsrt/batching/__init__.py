"""Batching: samples of many requests share the lanes of one engine, row by row."""
