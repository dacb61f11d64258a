"""`ci2p-cache bench`: what this machine does with the user's own data; measured, never assumed."""
