"""Speed and memory at real sizes, on random weights: `clock` measures, `lab` builds models and remembers what was measured, `rows` are the figures of
the field as formulas over that, `table` runs them one after the other and keeps each on disk."""
