"""transformers' side: checkpoints stay packed in memory and run through quantkit's kernels.

`plugin` is installed by `import quantkit` and waits for transformers; `quantizer` is what it registers. Loading goes

    planning     which modules of the empty model become packed, and which tensor on disk goes where
    disk         the tensors of a layer, to codes and back
    held         codes and scales as an operator wants them, and back; `stack` the same of all experts of a layer
    conversion   the above, where transformers asks for it while it loads and saves
    linear, experts   the modules that take the places of dense ones; `product` and `rounding` are their arithmetic
    joint, parallel   several layers in one launch, one layer on several ranks
"""
