# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What expert placement does to serving
#
# Every figure here is made from the cells of one run by the functions of `bench/`; nothing is computed in the
# notebook itself. `python -m bench report RUN_FOLDER` makes it again.

# %%
from IPython.display import Image, Markdown, display

from bench import plots
from bench.report import load_run

run = load_run(".")  # the notebook is executed in the folder of its run
display(Markdown(run.markdown))

# %% [markdown]
# ## Latency and throughput
# Median over blocks, bars from the least to the largest block. Rows that do not count are left out.

# %%
display(Image(plots.png(plots.latency_plot(run.cells, run.note))))

# %% [markdown]
# ## Ratio to vanilla EPLB
# Geometric mean over blocks; bars are 95 % intervals (Student's t on the logarithms), and are missing where there
# is only one block. A single block cannot tell a difference from noise.

# %%
display(Image(plots.png(plots.ratio_plot(run.ratios, run.note))))
display(run.ratios)

# %% [markdown]
# ## Placement: balancedness and fan-out
# Before: the placement that the server started with, on its first window. After: the placement in use, on the traffic
# of the measured rows, which it was not planned on.

# %%
display(Image(plots.png(plots.placement_plot(run.cells, run.node_title))))

# %% [markdown]
# ## Rebalances

# %%
display(Image(plots.png(plots.rebalance_plot(run.rebalances))))

# %% [markdown]
# ## All rows

# %%
display(run.cells.drop(columns=["hardware", "commit", "sglang"]))
