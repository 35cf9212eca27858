"""What every native kernel is made of: instructions, compilation, the cache, threads, programs."""
