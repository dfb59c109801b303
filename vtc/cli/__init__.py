"""The command lines. Nothing here imports torch, numpy or Pillow before the arguments are parsed."""
