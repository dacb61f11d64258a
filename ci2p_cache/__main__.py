"""Makes `python -m ci2p_cache` the same as the `ci2p-cache` script."""

from ci2p_cache.cli.start import main

if __name__ == "__main__":
    main()
