"""Matrix products: of blocks, of plain weights, of experts."""
