"""The parity ladder: the golden file, how an engine is measured against it, and the rungs."""
