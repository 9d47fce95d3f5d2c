"""transformers' side: checkpoints stay packed in memory and run through quantkit's kernels.

`plugin` is installed by `import quantkit` and waits for transformers; `quantizer` is what it registers; `linear` is the
module that takes the place of `torch.nn.Linear`.
"""
