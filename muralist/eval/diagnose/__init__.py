"""Artifacts of generated video, found from its pixels: seams, pulse, drift, repeats, copies, slow motion, fake resolution."""
