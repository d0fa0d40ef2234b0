"""What an embedder may rely on, tried: see __main__."""
