"""Reference implementations of deep-learning architecture families in JAX and Flax."""


def __getattr__(name: str) -> object:
  """`dljax.load`, which is looked up when it is used: `import dljax` alone imports nothing."""
  if name == "load":
    from dljax.runs import load

    return load
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
