"""`python -m mtl_dist` is `mtl`; launchers use it: `accelerate launch ... -m mtl_dist train RECIPE`."""

from mtl_dist.cli import main

if __name__ == "__main__":
    main()
