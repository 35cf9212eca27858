"""How weights of block types are kept on the GPU."""
