"""R8: what a stranger sends costs an exit code and nothing else: no code run, no memory, no file.

Each case is made as somebody would who knows the format: digests are made to fit where the attack
does not be in the digest itself.
"""
