"""The cache: the contract between both stages; README.md here specifies the format."""
