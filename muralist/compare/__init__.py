"""Recipes, files and variants side by side: a resumable grid of runs, what each gave and cost, and one page to look at.

`grid` plans and makes the cells, `journal` says what they cost, `media` makes what a browser can show, `quality` measures, `table` puts it
all together, `page` writes the report; `ablation` compares variants of a training.
"""
