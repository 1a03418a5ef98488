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
# # Does placing experts by affinity help?
#
# The same requests went to servers that differ only in which GPU holds which experts. First the table, then the plot,
# then what stands against it; everything else follows. Every figure is made from the cells of one run by the functions
# of `bench/`; nothing is computed in the notebook itself. `python -m bench report RUN_FOLDER` makes it again.

# %%
from IPython.display import Image, Markdown, display

from bench.publish import plots, routing_plots
from bench.publish.report import load_run, shown_layers

run = load_run(".")  # the notebook is executed in the folder of its run
display(Markdown(run.opening))

# %%
opening = plots.placement_plot(run.cells, run.placement_titles, run.note) if run.on_cpu else None
if opening is None and not run.ratios.empty:
    opening = plots.ratio_plot(run.ratios, run.note)
if opening is not None:
    display(Image(plots.png(opening)))

# %% [markdown]
# ## What stands against it

# %%
display(Markdown("\n".join(f"- {caveat}" for caveat in run.caveats)))

# %% [markdown]
# ## Latency and throughput
# Geometric mean over blocks with its 95 % interval (none for a single block). Rows that do not count are left out.

# %%
display(Image(plots.png(plots.latency_plot(run.cells, run.note))))

# %% [markdown]
# ## Ratio to vanilla EPLB
# Geometric mean over blocks; bars are 95 % intervals (Student's t on the logarithms), and are missing where there
# is only one block. A single block cannot tell a difference from noise.

# %%
if run.ratios.empty:
    print("Nothing was measured beside vanilla EPLB.")
else:
    display(Image(plots.png(plots.ratio_plot(run.ratios, run.note))))
    display(run.ratios)

# %% [markdown]
# ## Placement: balancedness and fan-out
# Before: the placement that the server started with, on its first window. After: the placement in use, on the traffic
# of the measured rows, which it was not planned on.

# %%
display(Image(plots.png(plots.placement_plot(run.cells, run.placement_titles, run.note))))

# %% [markdown]
# ## Rebalances

# %%
display(Image(plots.png(plots.rebalance_plot(run.rebalances, run.note))))

# %% [markdown]
# Rebalances over the inter-token latency of one row of each arm, at the largest concurrency.

# %%
display(Image(plots.png(routing_plots.timeline_plot(run.timelines, run.note))))

# %% [markdown]
# ## Co-activation, load and fan-out under each placement
# Not measured but computed: from the routing that the run recorded on the server without EPLB, each placement is
# planned on one half of the tokens and shown on the other half. Slots are in the order of GPUs; what lies inside the
# blocks on the diagonal stays on a GPU.

# %%
if run.views:
    display(Image(plots.png(routing_plots.coactivation_plot(run.views, shown_layers(run.views), run.note))))
    display(Image(plots.png(routing_plots.load_plot(run.views, run.note))))
    display(Image(plots.png(routing_plots.fanout_plot(run.views, run.note))))
else:
    display(Markdown("The run recorded no routing (it had no server without EPLB)."))

# %% [markdown]
# ## All rows

# %%
display(run.cells.drop(columns=["hardware", "commit", "sglang", "sitting"]))

# %% [markdown]
# ## Every table of the run

# %%
display(Markdown(run.markdown))
