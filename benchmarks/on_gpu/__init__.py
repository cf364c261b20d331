"""Parts of `benchmarks/gpu.py`: what is measured on a GPU, a file each; `setting` is what they share."""
