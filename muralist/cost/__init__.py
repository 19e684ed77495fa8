"""What a forward costs, from configurations alone: `transformer`, `vae`, `text`; and what a `machine` can do. `plan` puts them together."""
